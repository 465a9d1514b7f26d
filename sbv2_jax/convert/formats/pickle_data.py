"""Pickled plain data, read opcode by opcode: nothing in it is imported or called.

Python's own reader imports what a pickle names and calls it. Here the opcodes of dictionaries, lists, tuples, strings
and numbers are followed by a loop; a name is looked up in a table of the caller's, and anything else is an error.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from sbv2_jax.errors import InputError

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = frozenset(
    (
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINFLOAT", "FLOAT"),
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"),
    )
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset(("PROTO", "FRAME"))


class Refused(Exception):
    """Raised for what is no plain data."""


def read_pickle(
    file: BinaryIO,
    source: str,
    *,
    known: Mapping[str, Callable] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the plain data of the pickle that starts at the file's position, and leaves the file behind it.

    `known` holds, by "module name", the functions that stand for what the pickle names; `persistent` turns the
    identifier of data that lies elsewhere into what stands for it. Raises InputError, starting with `source`, for
    anything else that a pickle can hold.
    """
    try:
        return _follow(file, known or {}, persistent)
    except Refused as error:
        raise InputError(
            f"{source} is a pickle that holds more than tensors: {error}; it was not run"
        ) from error
    # a length that was changed asks for more memory than there is
    except (
        *(ValueError, TypeError, KeyError, IndexError, EOFError),
        *(OverflowError, AttributeError, MemoryError),
    ) as error:
        raise InputError(f"{source} is a broken pickle: {error}") from error


def _follow(file: BinaryIO, known: Mapping[str, Callable], persistent: Callable[[Any], Any] | None) -> Any:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        place = max(i for i, value in enumerate(stack) if value is _MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "APPENDS":
            items = since_mark()
            stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = since_mark()
            _set(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_named(known, str(argument)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(known, f"{module} {attribute}"))
        elif name == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if function not in known.values():
                raise Refused("a call of what is no function of tensors")
            stack.append(function(*arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of a dictionary or a parameter: `_metadata` and the like
        elif name == "STOP":
            return stack.pop()
        elif name not in _NOTHING:
            raise Refused(f"the opcode {name}")
    raise Refused("no end")


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise Refused("items of what is no dictionary")
    target.update(zip(items[::2], items[1::2], strict=True))


def _named(known: Mapping[str, Callable], name: str) -> Callable:
    if name not in known:
        raise Refused(f"the name {name!r}")
    return known[name]
