"""The fields of a configuration file as its readers take them: which change nothing, and which numbers are whole."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

# What diffusers' EMAModel writes into the config.json of the network that it averaged.
_EMA_HELPER = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
    "max_value",
)


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field that no reader knows changes nothing.

    A library's next version writes what it adds into every file, null or false where it is not used.
    """
    return name.startswith("_") or name in _EMA_HELPER or value is None or value is False


def as_declared(fields: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a dataclass's fields, 8.0 as 8 where a whole number is meant, lists as tuples."""
    kinds = {field.name: field.type for field in dataclasses.fields(fields)}
    return {
        name: _whole(hashable(value), kinds[name]) if name in kinds else value
        for name, value in values.items()
    }


def hashable(value: Any) -> Any:
    """Returns a value with its lists as tuples."""
    return tuple(hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _whole(value: Any, kind: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_whole(item, kind) for item in value)
    return int(value) if isinstance(value, float) and value.is_integer() and _is_whole(kind) else value


def _is_whole(kind: Any) -> bool:
    parts = typing.get_args(kind)
    return kind is int or (float not in parts and any(_is_whole(part) for part in parts))
