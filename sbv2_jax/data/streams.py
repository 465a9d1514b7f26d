"""Files of prompts as bytes and as lines: unpacked where they are compressed, their lines numbered."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from sbv2_jax.errors import InputError

# What a name ends in where its file is compressed; the file's first bytes decide.
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
HEAD = 1 << 16
# Of a line, or of a JSON text that is not one a line: such a text is held in memory as a whole.
MAX_TEXT = 1 << 30
_CHUNK = 1 << 20
_BOM = "\ufeff"

_Opener = Callable[[Path, Literal["rb"]], io.BufferedIOBase]


def head_of(path: Path) -> bytes:
    """Returns the first 65,536 bytes of a file, unpacked; raises InputError as `chunks` does."""
    parts, size = [], 0
    for chunk in chunks(path):
        parts.append(chunk)
        size += len(chunk)
        if size >= HEAD:
            break
    return b"".join(parts)[:HEAD]


def is_packed(path: Path) -> bool:
    """Whether the first bytes of a file are those of a compressed one; raises InputError as `chunks` does."""
    return _opener(path) is not None


def chunks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked from gzip, bzip2, xz or Zstandard.

    Raises InputError for a file that is missing, cannot be read, or is not a whole compressed one.
    """
    opener = _opener(path)
    try:
        with (opener or open)(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: not a whole compressed file: {error}") from error
    except OSError as error:
        if opener is None:
            raise InputError(f"{path}: cannot be read as a prompt file: {error.strerror or error}") from error
        raise InputError(f"{path}: not a whole compressed file: {' '.join(str(error).split())}") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line without its end) of a UTF-8 text, unpacked; lines end in LF, CRLF or CR.

    Raises InputError as `chunks` does, with its number for a line that is not UTF-8, and for one over 1 GiB.
    """
    numbers = itertools.count(1)
    pieces: list[bytes] = []  # of a line that has not ended
    size, after_cr = 0, False

    def text(data: bytes) -> tuple[int, str]:
        number = next(numbers)
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number}: not UTF-8: save the file as UTF-8") from error
        return number, line.removeprefix(_BOM) if number == 1 else line

    for chunk in chunks(path):
        if after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
        after_cr = chunk[-1:] == b"\r" if chunk else False
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        size += len(first)
        if size > MAX_TEXT:
            raise InputError(f"{path}, line {next(numbers)}: longer than {MAX_TEXT >> 30} GiB")
        if rest:
            yield text(b"".join(pieces))
            for line in rest[:-1]:
                yield text(line)
            pieces, size = [rest[-1]], len(rest[-1])
    if size:
        yield text(b"".join(pieces))


def _opener(path: Path) -> _Opener | None:
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a prompt file: {error.strerror}") from error
    for magic, opener in (
        (b"\x1f\x8b", gzip.open),
        (b"BZh", bz2.open),
        (b"\xfd7zXZ\0", lzma.open),
        (b"\x28\xb5\x2f\xfd", _open_zstd),
    ):
        if start.startswith(magic):
            return opener
    return None


def _open_zstd(path: Path, mode: Literal["rb"]) -> io.BufferedIOBase:
    # Python has it from 3.14 on; pyarrow brings it along.
    return pyarrow(path).input_stream(os.fspath(path), compression="zstd")


def pyarrow(path: Path) -> Any:
    """Returns the pyarrow package; raises InputError, naming the file that needs it, where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f'{path}: reading it needs pyarrow: pip install "sbv2_jax[parquet]"') from error
    return pyarrow
