"""The shell of every command: flags in, one line of error out.

A command that reads a config file defines absl flags and calls `run(main, ...)`; the others declare their flags as
`Flag`s and call `run_flags` or, where there are subcommands, `run_commands`. Whatever the user got wrong ends as
`error: ...` on stderr with exit code 2, before jax is imported where flags and configuration are to blame; so does
what the system refuses, such as a write to a full disk.
"""

import argparse
import glob
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging

from sbv2_jax import __version__, fields
from sbv2_jax.errors import InputError

EXIT_INPUT = 2
CONFIG = "config"
INSTALLED = "sbv2-"  # begins the name of a script that was installed as a command
# Flags that are defined here for a launch script are that script's.
flags.disclaim_key_flags()


def path(text: str) -> str:
    """A path, or what may stand in its place (a hub id, `bundled`): `~` is the home directory."""
    return os.path.expanduser(text)


_METAVARS = {str: "TEXT", int: "N", float: "X", path: "PATH"}


class Flag(NamedTuple):
    """A flag of a command, `--name=VALUE`, or of the kind `bool` alone, `--name`.

    `kind` converts the text (`str`, `int`, `float`, `path`), `check` says what the value must be; a flag of
    `several` values may be given several times and holds a list, any other one once. One that is `positional` is
    given without its name, and must be.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = str
    check: fields.Check | None = None
    default: Any = None
    required: bool = False
    several: bool = False
    positional: bool = False


class Command(NamedTuple):
    """A subcommand: its flags, and what it does with their values."""

    flags: Sequence[Flag]
    call: Callable[[argparse.Namespace], Any]


def run(
    main: Callable[[], Any],
    required: Sequence[str] = (),
    config_fields: Mapping[str, fields.Field] | None = None,
) -> NoReturn:
    """Parses absl's flags, calls `main()` and exits with what it returns.

    Args:
      main: called without arguments.
      required: names of flags that must be given.
      config_fields: the fields of --config, which --help explains.
    """

    def parse(argv: list[str]) -> list[str]:
        if wanted := {"--help", "-help", "-h", "--helpshort", "--version"} & set(argv[1:]):
            print(_version() if wanted == {"--version"} else _help(main.__module__, config_fields or {}))
            sys.exit(0)
        try:
            _parse(argv, required)
        except (InputError, flags.Error) as error:
            fail(str(error))
        return []

    _run(main, sys.argv, parse)


def run_flags(
    main: Callable[[argparse.Namespace], Any], declared: Sequence[Flag], description: str
) -> NoReturn:
    """Parses the declared flags, calls `main(values)` and exits with what it returns."""
    _run(lambda: main(read_flags(sys.argv[1:], declared, description)), sys.argv[:1], flags.FLAGS)


def run_commands(commands: Mapping[str, Command], description: str) -> NoReturn:
    """Parses a subcommand and its flags, calls it and exits with what it returns."""
    _run(lambda: call_command(sys.argv[1:], commands, description), sys.argv[:1], flags.FLAGS)


def call_command(argv: Sequence[str], commands: Mapping[str, Command], description: str) -> Any:
    """Calls the subcommand that begins a command line; raises InputError for what is wrong with it."""
    name = argv[0] if argv else ""
    if name in ("-h", "--help", "--version"):
        listed = "".join(f"\n  {one:<18}{_doc(command)}" for one, command in commands.items())
        read_flags(argv[:1], (), f"{description}\n\ncommands (each has its own --help):{listed}", "COMMAND")
    if not name or name.startswith("-"):
        raise InputError(f"one command is expected: {', '.join(commands)}")
    if name not in commands:
        raise InputError(f"unknown command {name!r}{fields.nearest(name, commands, '')}")
    command = commands[name]
    every = [flag for one in commands.values() for flag in one.flags]
    return command.call(read_flags(argv[1:], command.flags, _doc(command), name, every))


def read_flags(
    argv: Sequence[str],
    declared: Sequence[Flag],
    description: str,
    command: str = "",
    elsewhere: Sequence[Flag] = (),
) -> argparse.Namespace:
    """Returns the values of the declared flags, those of `path` with `~` expanded.

    Raises InputError for a flag that is unknown (or of another command, whose flags are `elsewhere`), missing, wrong,
    or given twice. Exits for --help and --version.
    """
    parser = _Parser(description, command, declared)
    values, rest = parser.parse_known_args(list(argv))
    known = [f"--{flag.name}" for flag in declared if not flag.positional]
    if rest:
        name = rest[0].partition("=")[0]
        if not name.startswith("-"):
            raise InputError(f"unexpected argument {rest[0]!r}")
        if name in {f"--{flag.name}" for flag in elsewhere}:
            raise InputError(f"{command} does not take {name}")
        raise InputError(f"unknown flag {name}{fields.nearest(name, known, '')}")
    require(values, [flag.name for flag in declared if flag.required], command)
    return values


# Of a command that several processes may share; `devices.processes.join` takes what they say.
PROCESSES = (
    Flag("coordinator", "HOST:PORT of process 0, of several processes."),
    Flag("num_processes", "How many processes there are.", int, fields.whole(1)),
    Flag("process_id", "Which of them this is.", int, fields.whole(0)),
    Flag("pod", "Find the other processes by a TPU pod's metadata, SLURM or MPI.", bool),
)


def require(values: argparse.Namespace, names: Sequence[str], command: str = "") -> None:
    """Raises InputError that lists which of these flags were not given."""
    if missing := [f"--{name}" for name in names if getattr(values, name) in (None, [])]:
        raise InputError(f"{f'{command} needs' if command else 'missing'} {', '.join(missing)} (see --help)")


def define_path(name: str, help_text: str) -> flags.FlagHolder:
    """Defines an absl flag that holds a path, or nothing; `~` is the home directory."""
    return flags.DEFINE(_PathParser(), name, None, help_text, serializer=flags.ArgumentSerializer())


def command(name: str) -> str:
    """How the user calls another command, such as "generate": by its script, or as installed where this one was."""
    installed = os.path.basename(sys.argv[0]).startswith(INSTALLED)
    return f"{INSTALLED}{name}" if installed else f"python launch/{name}.py"


def fail(message: str) -> NoReturn:
    """Prints one line, `error: ...`, on stderr and exits with code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_INPUT)


def quiet_libtpu() -> None:
    """Keeps libtpu, where it is installed beside no TPU, from printing errors as jax looks for devices.

    It is told the topology that it would otherwise ask the metadata server of a cloud machine for. That cannot hide
    a TPU: chips are reached through /dev/accel* (v2 to v4) or /dev/vfio/N (v5 and later) and nothing is set where
    one of these exists, where JAX_PLATFORMS says what is wanted, or where the environment speaks of a TPU (jax
    itself sets TPU_SKIP_MDS_QUERY where the PCI bus has no chip, but libtpu then misses the other two).
    """
    asked = {
        "JAX_PLATFORMS",
        "JAX_FORCE_TPU_INIT",
        "TPU_NAME",
        "TPU_WORKER_HOSTNAMES",
        "TPU_ACCELERATOR_TYPE",
    }
    if asked & {name for name, value in os.environ.items() if value}:
        return
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v4-8")


def _run(main: Callable[[], Any], argv: list[str], parse: Callable[[list[str]], Any]) -> NoReturn:
    def guarded(_: Any) -> Any:
        # The libraries narrate at INFO; a command that works says only what it has to say itself.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        quiet_libtpu()
        try:
            return main()
        except InputError as error:
            fail(str(error))
        except OSError as error:
            # The system's own: a full disk, a directory that is not writable. A library's has no number.
            if error.errno is None:
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            fail(f"{place}{error.strerror or error}")

    app.run(guarded, argv=argv, flags_parser=parse)


def _version() -> str:
    return f"sbv2_jax {__version__}"


def _help(module: str, config_fields: Mapping[str, fields.Field]) -> str:
    # Of a script, absl knows the flags by the name of its file; of an installed command, by the module's.
    own = flags.FLAGS.main_module_help() if module == "__main__" else flags.FLAGS.module_help(module)
    text = f"{sys.modules[module].__doc__ or ''}\nflags:\n{own}\n  --version"
    text += ": Print the version and stop."
    if config_fields:
        text += f"\n\nfields of the configuration, --{CONFIG}.FIELD=VALUE, and their defaults before the file's:\n\n"
        text += fields.as_text(config_fields)
    return text.strip()


class _ForceParser(flags.ArgumentParser):
    """Reads a flag that may stand alone, or have names: True, False, or a tuple of them."""

    def parse(self, argument: Any) -> bool | tuple[str, ...]:
        words = {"true": True, "false": False}
        if isinstance(argument, bool):
            return argument
        if argument in words:
            return words[argument]
        names = tuple(filter(None, (name.strip() for name in argument.split(","))))
        if not names:
            raise ValueError("names are expected after the =")
        return names

    def flag_type(self) -> str:
        return "names"


def define_force(name: str, explanation: str) -> flags.FlagHolder:
    """Defines a flag that is given alone, `--NAME`, for all, or with names, `--NAME=A,B`, for these."""
    flag = flags.Flag(_ForceParser(), None, name, False, explanation)
    flag.boolean = True  # else absl would take the next word of the command line for its value
    return flags.DEFINE_flag(flag)


def _doc(command: Command) -> str:
    return (command.call.__doc__ or "").strip()


class _PathParser(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return path(argument)


class _Parser(argparse.ArgumentParser):
    """argparse with the error texts of this project, every value checked and none taken twice."""

    def __init__(self, description: str, command: str, declared: Sequence[Flag]):
        super().__init__(
            prog=" ".join(filter(None, (os.path.basename(sys.argv[0]), command))),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        usage = [self.prog]
        for flag in declared:
            if flag.kind is bool:
                self.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
                usage.append(f"[--{flag.name}]")
                continue
            metavar = _METAVARS[flag.kind]
            if flag.positional:
                self.add_argument(
                    flag.name, action=_Store, flag=flag, metavar=flag.name.upper(), help=flag.help
                )
                usage.append(flag.name.upper())
                continue
            self.add_argument(
                f"--{flag.name}",
                action=_Store,
                flag=flag,
                default=[] if flag.several else flag.default,
                metavar=metavar,
                help=flag.help + ("" if flag.default is None else f" Default: {flag.default}."),
            )
            usage.append(f"--{flag.name}={metavar}" if flag.required else f"[--{flag.name}={metavar}]")
        self.usage = " ".join(usage)
        self.add_argument(
            "--version", action="version", version=_version(), help="Print the version and stop."
        )

    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"argument (--\w+): expected one argument", message):
            message = f"{match[1]} needs a value (one that begins with a dash as {match[1]}=VALUE)"
        elif match := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"missing {match[1]} (see --help)"
        raise InputError(message)


class _Store(argparse.Action):
    def __init__(self, *args: Any, flag: Flag, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        text: Any,
        option_string: str | None = None,
    ) -> None:
        kind, check, several = self._flag.kind, self._flag.check, self._flag.several
        try:
            value = kind(text)
        except ValueError:
            value = text  # which the check refuses, saying what is expected
        if expected := check and check(value):
            given = f"{option_string}={text}" if option_string else f"{self.metavar} {text!r}"
            raise InputError(f"{given}: must be {expected}")
        if several:
            setattr(namespace, self.dest, [*getattr(namespace, self.dest), value])
            return
        seen = namespace.__dict__.setdefault("_seen", set())
        if self.dest in seen:
            raise InputError(_twice(option_string or str(self.metavar)))
        seen.add(self.dest)
        setattr(namespace, self.dest, value)


def _parse(argv: list[str], required: Sequence[str]) -> None:
    """Gives absl's flags their values; raises InputError or absl's own error for anything wrong on the command line."""
    if CONFIG in flags.FLAGS:
        argv = _check_config(argv)
    positional = flags.FLAGS(argv)[1:]
    for name in flags.FLAGS:
        if flags.FLAGS[name].present > 1 and not isinstance(flags.FLAGS[name], flags.MultiFlag):
            raise InputError(_twice(f"--{name}"))
    missing = [f"--{name}" for name in required if flags.FLAGS[name].value is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)} (see --help)")
    if positional:
        raise InputError(f"unexpected argument {positional[0]!r}")


def _twice(flag: str) -> str:
    return f"{flag} is given twice; it takes one value"


def _check_config(argv: list[str]) -> list[str]:
    """Loads the config file before its flag does, which wraps its errors in a traceback or defers them.

    Returns the command line with the file's whole path.
    """
    argv, specs, overrides = list(argv), [], []
    for position, argument in enumerate(argv[1:], start=1):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if argument == "--":
            break
        if name == CONFIG:
            if equals:
                argv[position] = f"--{CONFIG}={fields.config_spec(value)}"
            elif position + 1 < len(argv):
                value = argv[position + 1] = fields.config_spec(argv[position + 1])
            specs.append(value)
        elif name.startswith((f"{CONFIG}.", f"no{CONFIG}.")):
            overrides.append(name.partition(".")[2])
    if len(specs) > 1:
        raise InputError(_twice(f"--{CONFIG}"))
    if not specs:
        if overrides:
            raise InputError(f"--{CONFIG}.{overrides[0]} needs a --{CONFIG}=FILE.py before it")
        return argv
    _check_overrides(overrides, fields.load(specs[0]))
    return argv


def _check_overrides(overrides: Sequence[str], config: Mapping) -> None:
    known = fields.field_names(config)
    groups = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
    for name in overrides:
        if name in groups:
            raise InputError(f"--{CONFIG}.{name} is a group; set one of its fields, --{CONFIG}.{name}.FIELD")
        if name not in known:
            raise InputError(f"unknown field --{CONFIG}.{name}{fields.nearest(name, known, f'--{CONFIG}.')}")
        # Of a tuple, ml_collections takes an item from each.
        if overrides.count(name) > 1 and not isinstance(fields.value_of(config, name), tuple):
            raise InputError(_twice(f"--{CONFIG}.{name}"))
