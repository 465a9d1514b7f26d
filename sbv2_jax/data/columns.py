"""The column of a table, or key of an object, that holds the prompts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sbv2_jax.errors import InputError
from sbv2_jax.fields import nearest

USUAL = ("prompt", "caption", "text", "description", "sentence")
HOW = "name it by --column (in a configuration, config.prompts_column)"
_NAMED = 10


def usual(names: Iterable[str]) -> list[str]:
    """Returns those names that columns of prompts usually have, in any case and number: `TEXT`, `Captions`."""
    known = {*USUAL, *(f"{name}s" for name in USUAL)}
    return [name for name in names if name.strip().strip('"').lower() in known]


def choose(names: Sequence[str], column: str, source: str) -> str:
    """Returns the name of the column that holds the prompts: `column`, or without it the one with a usual name.

    A `column` may go on into nested objects, as in `sentences.raw`; its first name is returned then.
    Raises InputError, starting with `source`, where there is none, or more than one.
    """
    if column:
        if column in names:
            return column
        root = column.split(".")[0]
        if root in names:
            return root
        raise InputError(f"{source}: no column {column!r} in {_list(names)}{nearest(column, names, '')}")
    found = usual(names)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{source}: each of its columns {_list(found)} may hold the prompts: {HOW}")
    raise InputError(f"{source}: none of its columns {_list(names)} is one of {', '.join(USUAL)}: {HOW}")


def leaves(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """Yields what lies at a path of keys in nested objects: of a list every entry, at `*` every value.

    Raises KeyError where there is nothing.
    """
    if isinstance(value, list):
        for entry in value:
            yield from leaves(entry, path)
    elif not path:
        yield value
    elif isinstance(value, dict):
        whole = ".".join(path)
        if whole in value:  # a key with dots in it
            yield from leaves(value[whole], ())
        elif path[0] == "*":
            yield from leaves(list(value.values()), path[1:])
        else:
            yield from leaves(value[path[0]], path[1:])
    elif value is not None:
        raise KeyError(path[0])


def described(column: str, names: Sequence[str]) -> str:
    """Returns the words that say which column was guessed."""
    return f"the prompts are its column {column!r}, of {_list(names)}"


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(ascii(name)[1:-1][:60] for name in names[:_NAMED]) + more
