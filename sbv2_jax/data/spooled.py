"""Prompts of a file that is no plain text, written out as plain text once: then they are read as that is."""

import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sbv2_jax.data.text_prompts import TextPrompts, clean_text
from sbv2_jax.errors import InputError


class SpooledPrompts(TextPrompts):
    """A random-access source of `str` over prompts that a reader of `tables` or `streams` yields.

    They are kept in a temporary file without a name (in TMPDIR), one a line, so that memory does not grow with
    them. What is blank or None is left out, and counted in the notes. The fingerprint is of the prompts, whatever
    the file's format.
    `reopen()` reads them again, in a process that does not have this file.
    Raises InputError for a value that is no string, naming its place, and where no prompt is left.
    """

    def __init__(
        self,
        path: Path,
        values: Iterator[tuple[str, Any]],
        notes: list[str],
        reopen: Callable[[], TextPrompts],
    ):
        self._reopen = reopen
        self._file = tempfile.TemporaryFile(prefix="sbv2_jax_prompts_")  # noqa: SIM115 (as long as the source)
        left_out = 0
        for place, value in values:
            text = _text(path, place, value)
            left_out += not text
            if text:
                self._file.write(text.encode() + b"\n")
        self._file.flush()
        if not self._file.tell():
            raise InputError(f"{path}: no prompts, only {left_out} blank ones")
        super().__init__(path)
        if left_out:
            notes.append(f"{path}: {left_out} blank prompts are left out")
        self.notes = tuple(notes)

    def __reduce__(self) -> tuple:
        return self._reopen, ()

    def __repr__(self) -> str:
        return f"SpooledPrompts({self._path!r}, {self._length} prompts)"

    def _open(self) -> mmap.mmap:
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)


def _text(path: Path, place: str, value: Any) -> str:
    if value is None:
        return ""
    try:
        return clean_text(value.decode("utf-8") if isinstance(value, bytes) else _string(path, place, value))
    except UnicodeError as error:
        raise InputError(f"{path}, {place}: not UTF-8: save the file as UTF-8") from error


def _string(path: Path, place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{path}, {place}: {type(value).__name__} {str(value)[:40]!r}, a prompt is a string")
    return value
