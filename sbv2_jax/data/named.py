"""Prompt sources that are code, named by a word of `NAMED` or by a dotted path, such as `package.module:Source`."""

import importlib
import re
from typing import Any

from sbv2_jax.errors import InputError

NAMED = {"openmoji": "sbv2_jax.openmoji.world:Captions"}

_DOTTED = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.\w+)*):(?P<name>[A-Za-z_]\w*)(?::(?P<count>\d+))?")
_WORD = re.compile(r"(?P<word>\w+)(?::(?P<count>\d+))?")
_PROTOCOL = ("__len__", "__getitem__", "fingerprint")


def named_source(name: str) -> Any | None:
    """Returns the prompt source of a name, None where it is no such name; a number after a colon limits it.

    The object that the path leads to is called, without arguments or with the number. A module of your own must be
    importable: installed, or in a directory of PYTHONPATH.
    Raises InputError where it cannot be imported, raises, or lacks a method of `prompts.PromptSource`.
    """
    word = _WORD.fullmatch(name)
    if word and word["word"] in NAMED:
        match, count = _DOTTED.fullmatch(NAMED[word["word"]]), word["count"]
    else:
        match = _DOTTED.fullmatch(name)
        count = match and match["count"]
    if match is None:
        return None
    try:
        make = getattr(importlib.import_module(match["module"]), match["name"])
        source = make(int(count)) if count else make()
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (the module may raise anything)
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: neither a file nor a prompt source: {type(error).__name__}: {reason}"
        ) from error
    if missing := [method for method in _PROTOCOL if not hasattr(source, method)]:
        raise InputError(
            f"{name}: a prompt source has {', '.join(_PROTOCOL)}; this lacks {', '.join(missing)}"
        )
    return source
