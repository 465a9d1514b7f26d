"""Pictures that are drawn once for a run, and read again at each further start of it."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbv2_jax.checkpoint.manifest import json_digest
from sbv2_jax.convert.formats.files import replaced_file
from sbv2_jax.devices import processes

Columns = dict[str, np.ndarray]
_KEY = "sha256"


def kept(path: Path, of: dict[str, Any], draw: Callable[[], Columns]) -> Columns:
    """Returns named pictures, uint8 [B, H, W, 3]: those that the file holds, or else drawn, and kept in it.

    `of` is JSON of all that they depend on: those of anything else, and a file that is damaged, are drawn again. Every
    process calls this, and draws with the others; what is read, process 0 has alone, which makes the grids. Raises
    InputError, in every process, where the file cannot be written.
    """
    key = json_digest(of)
    found = _read(path, key) if jax.process_index() == 0 else None
    if processes.told_by_the_first(found is not None):
        return found or {}
    columns = draw()
    with processes.together():
        if jax.process_index() == 0:
            with replaced_file(path) as partial, open(partial, "wb") as file:
                # Any, for savez has arguments of other types too.
                arrays: dict[str, Any] = {_KEY: np.array(key), **columns}
                np.savez(file, **arrays)
    return columns


def _read(path: Path, key: str) -> Columns | None:
    try:
        with np.load(path, allow_pickle=False) as stored:  # whose archive has a checksum for each of them
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return found if str(found.pop(_KEY, "")) == key else None
