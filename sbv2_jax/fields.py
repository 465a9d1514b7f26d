"""A config field, declared once: its default, what it may hold, and a line that explains it; loading config files.

From a table of declarations come the ConfigDict (`build`), its checks (`check_fields`), the text of --help
(`as_text`) and the pages of docs (`as_table`). Shared by every configuration; imports neither jax nor a model.
"""

import difflib
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from sbv2_jax.errors import InputError

# A check returns what the value must be where it is not that, and None where it is.
Check = Callable[[Any], str | None]


class Field(NamedTuple):
    """A field: its default, what it may hold, and a line that says what it does (units, special values)."""

    default: Any
    check: Check
    help: str
    mixed: bool = False  # values of several types may be set, which ml_collections refuses otherwise

    @property
    def expected(self) -> str:
        """What the value must be, in words."""
        return self.check(_NOTHING) or ""


_NOTHING = object()  # no check accepts it


def build(declared: Mapping[str, Field]) -> ConfigDict:
    """Returns the ConfigDict of declared fields, named "group.field", with their defaults; locked."""
    config = ConfigDict()
    for name, field in declared.items():
        *groups, leaf = name.split(".")
        group = config
        for one in groups:
            if one not in group:
                group[one] = ConfigDict()
            group = group[one]
        group[leaf] = FieldReference(field.default, object) if field.mixed else field.default
    return config.lock()


def as_text(declared: Mapping[str, Field]) -> str:
    """Returns what --help says of the fields, two lines each."""
    return "\n".join(f"  {name} = {field.default!r}\n    {field.help}" for name, field in declared.items())


def as_table(declared: Mapping[str, Field]) -> str:
    """Returns the fields as a Markdown table."""
    lines = ["| field | default | what it may be | what it does |", "|---|---|---|---|"]
    for name, field in declared.items():
        cells = (f"`{name}`", f"`{field.default!r}`", field.expected, field.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def config_spec(spec: str) -> str:
    """Returns FILE.py or FILE.py:ARGUMENT with `~` expanded.

    What is installed has configs/ within itself: where there is no such file, "configs/NAME.py" is the package's own.
    """
    name, colon, argument = spec.partition(":")
    path = Path(name).expanduser()
    if not path.exists() and path.parts == ("configs", path.name):
        installed = importlib.util.find_spec("sbv2_jax.configs")
        for directory in (installed and installed.submodule_search_locations) or ():
            if (Path(directory) / path.name).is_file():
                path = Path(directory) / path.name
    return f"{path}{colon}{argument}"


def load(spec: str) -> ConfigDict:
    """Returns what the `get_config` of a config file gives, locked; `spec` is as for `config_spec`.

    Raises InputError for a missing file, one that does not run, and an argument that it refuses.
    """
    name, _, argument = config_spec(spec).partition(":")
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"no config file {name!r} (a .py file is expected)")
    try:
        module = _run("config_file", path)
        config = module.get_config(argument) if argument else module.get_config()
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (the file may raise anything)
        raise InputError(f"config file {name}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"config file {name}: get_config() must return a ConfigDict")
    return config.lock()


def imported(spec: str, field: str, said: str = "") -> Any:
    """Returns what "package.module:NAME" or "path/file.py:NAME" names; `said` is how the user has named it.

    Raises InputError, beginning with the field, for what cannot be imported.
    """
    module, _, attribute = spec.rpartition(":")
    try:
        if not module or not attribute:
            raise ValueError('"package.module:NAME" or "file.py:NAME" is expected')
        return getattr(_module(module), attribute)
    except Exception as error:  # noqa: BLE001 (the file may raise anything)
        raise InputError(f"{field}: {said or spec}: {type(error).__name__}: {error}") from error


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}")
    return _run(f"imported_{path.stem}", path)


def _run(name: str, path: Path) -> Any:
    """Returns the module that a file is, having run it."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(argument: str, *known: str) -> set[str]:
    """Splits the argument of a config file at commas; raises InputError for a word that is not known."""
    found = set(filter(None, argument.split(",")))
    for word in sorted(found - set(known)):
        raise InputError(f"unknown config argument {word!r}{nearest(word, known, prefix='')}")
    return found


def field_names(config: Mapping, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields, not of the groups that hold them."""
    names = []
    for key, value in config.items():
        names += (
            field_names(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
        )
    return names


def check_fields(config: ConfigDict, declared: Mapping[str, Field]) -> None:
    """Raises InputError for the first field that is unknown, missing or fails its check."""
    names = field_names(config)
    for name in names:
        if name not in declared:
            raise InputError(f"unknown field config.{name}{nearest(name, declared)}")
    for name, field in declared.items():
        if name not in names:
            raise InputError(f"config.{name} is missing")
        value = value_of(config, name)
        if expected := field.check(value):
            raise InputError(f"config.{name} must be {expected}, not {value!r}")


def nearest(name: str, known: Iterable[str], prefix: str = "config.") -> str:
    """Returns "; did you mean ...?" with the known name most like this one, or an empty string."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    # A name without its group ("guidance") is far from the whole, but is still plain.
    close = close or [full for full in known if full.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def value_of(config: Mapping, name: str) -> Any:
    """Returns the value of a field by its dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def whole(low: int, high: int | None = None) -> Check:
    """A whole number of at least `low`, and at most `high` if given."""
    text = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and value >= low
        return None if right and (high is None or value <= high) else text

    return check


def number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Check:
    """A finite number from `low` to `high`; `above` and `below` leave out the ends."""
    text = f"a finite number {'>' if above else '>='} {low:g}" if low > -math.inf else "a finite number"
    text += f" and {'<' if below else '<='} {high:g}" if high < math.inf else ""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return text
        too_low = value <= low if above else value < low
        too_high = value >= high if below else value > high
        return text if too_low or too_high else None

    return check


def number_or_range(low: float) -> Check:
    """A number as `number` takes it, or two of them, the smaller first."""
    single = number(low)
    expected = f"{single(None)}, or two of them, (low, high)"

    def check(value: Any) -> str | None:
        if not isinstance(value, tuple | list):
            return expected if single(value) else None
        right = len(value) == 2 and not any(map(single, value)) and value[0] < value[1]
        return None if right else expected

    return check


def one_of(*choices: str) -> Check:
    """One of a few words."""
    text = "one of " + ", ".join(repr(choice) for choice in choices)
    return lambda value: None if isinstance(value, str) and value in choices else text


def either(special: int, otherwise: Check) -> Check:
    """A number that stands for something special, or whatever `otherwise` accepts."""

    def check(value: Any) -> str | None:
        # True == 1, so the type is compared as well.
        if type(value) is int and value == special:
            return None
        expected = otherwise(value)
        return expected and f"{expected}, or {special}"

    return check


def text(empty: bool = False) -> Check:
    """A string, not empty unless `empty`."""
    expected = "a string" if empty else "a string that is not empty"
    return lambda value: None if isinstance(value, str) and (empty or value.strip()) else expected


def regex(value: Any) -> str | None:
    """Accepts a regular expression that compiles."""
    if not isinstance(value, str) or not value:
        return "a regular expression"
    try:
        re.compile(value)
    except re.error as error:
        return f"a regular expression ({error})"
    return None


def rules(value: Any) -> str | None:
    """Accepts a tuple of pairs of a regular expression and a word."""
    expected = "a tuple of pairs (regular expression, strategy)"
    if not isinstance(value, tuple | list) or not value:
        return expected
    for pair in value:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
            return expected
        if wrong := regex(pair[0]):
            return f"{expected}; {pair[0]!r} is not {wrong}"
    return None


def falling(value: Any) -> str | None:
    """Accepts a tuple of whole numbers of at least 1, each below the one before; it may be empty."""
    right = isinstance(value, tuple | list) and not any(map(whole(1), value))
    if right and all(first > second for first, second in zip(value, value[1:], strict=False)):
        return None
    return "a tuple of whole numbers >= 1 that fall, such as (999, 499), or ()"


def strings(value: Any) -> str | None:
    """Accepts a tuple of strings that are not empty."""
    if isinstance(value, tuple | list) and all(isinstance(item, str) and item.strip() for item in value):
        return None
    return "a tuple of strings that are not empty"
