"""The shell of every command: flags in, one line of error out.

A launch script defines its flags and calls `run(main, ...)`. Whatever the user got wrong ends as `error: ...`
on stderr with exit code 2, before any device is touched where flags and configuration are to blame; so does what
the system refuses, such as a write to a full disk.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from sbv2_jax import fields
from sbv2_jax.errors import InputError

EXIT_INPUT = 2
CONFIG = "config"


def run(main: Callable[..., Any], required: Sequence[str] = (), commands: Sequence[str] = ()) -> NoReturn:
    """Parses the flags, calls `main()` and exits with what it returns.

    Args:
      main: called without arguments, or with the command where there are `commands`.
      required: names of flags that must be given.
      commands: the words of which the command line must hold exactly one, such as "to-diffusers".
    """

    def guarded(positional: list[str]) -> Any:
        # The libraries narrate at INFO; a command that works says only what it has to say itself.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            return main(*positional)
        except InputError as error:
            fail(str(error))
        except OSError as error:
            # The system's own: a full disk, a directory that is not writable. A library's has no number.
            if error.errno is None:
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            fail(f"{place}{error.strerror or error}")

    app.run(guarded, flags_parser=lambda argv: _parse(argv, required, commands))


def fail(message: str) -> NoReturn:
    """Prints one line, `error: ...`, on stderr and exits with code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_INPUT)


def check_command(command: str, table: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    """Compares the flags that were given with those that a command needs and may have.

    `table` holds both for every command; a command followed by a flag, as in "to-diffusers --model", is the
    form that it has with that flag. Raises InputError that lists what is missing or stray.
    """
    every = {name for needed, allowed in table.values() for name in (*needed, *allowed)}
    given = {name for name in every if flags.FLAGS[name].value is not None}
    form = next((f"{command} --{name}" for name in given if f"{command} --{name}" in table), command)
    needed, allowed = table[form]
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise InputError(f"{command} needs {', '.join(missing)} (see --help)")
    if stray := [f"--{name}" for name in sorted(given - {*needed, *allowed})]:
        raise InputError(f"{form} does not take {', '.join(stray)}")


def _parse(argv: list[str], required: Sequence[str], commands: Sequence[str]) -> list[str]:
    """Returns the positional arguments; fails with one line for anything wrong on the command line."""
    try:
        if CONFIG in flags.FLAGS:
            _check_overrides(argv)
        positional = flags.FLAGS(argv)[1:]
        missing = [f"--{name}" for name in required if flags.FLAGS[name].value is None]
        if missing:
            raise InputError(f"missing {', '.join(missing)} (see --help)")
        _check_positional(positional, commands)
    except (InputError, flags.Error) as error:
        fail(str(error))
    return positional


def _check_overrides(argv: Sequence[str]) -> None:
    """Loads the config file before the flag does, which wraps its errors in a traceback or defers them."""
    spec, overrides = None, []
    for position, argument in enumerate(argv[1:], start=1):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if argument == "--":
            break
        if name == CONFIG:
            spec = value if equals else (argv[position + 1] if position + 1 < len(argv) else "")
        elif name.startswith((f"{CONFIG}.", f"no{CONFIG}.")):
            overrides.append(name.partition(".")[2])
    if spec is None:
        if overrides:
            raise InputError(f"--{CONFIG}.{overrides[0]} needs a --{CONFIG}=FILE.py before it")
        return
    config = fields.load(spec)
    known = fields.field_names(config)
    groups = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
    for name in overrides:
        if name in groups:
            raise InputError(f"--{CONFIG}.{name} is a group; set one of its fields, --{CONFIG}.{name}.FIELD")
        if name not in known:
            raise InputError(f"unknown field --{CONFIG}.{name}{fields.nearest(name, known, f'--{CONFIG}.')}")


def _check_positional(positional: Sequence[str], commands: Sequence[str]) -> None:
    if not commands and positional:
        raise InputError(f"unexpected argument {positional[0]!r}")
    if commands and len(positional) != 1:
        raise InputError(f"one command is expected: {', '.join(commands)}")
    if commands and positional[0] not in commands:
        raise InputError(f"unknown command {positional[0]!r}{fields.nearest(positional[0], commands, '')}")
