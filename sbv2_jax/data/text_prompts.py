"""Prompts from a UTF-8 text file, one a line, with memory that does not grow with the file."""

import codecs
import hashlib
import mmap
import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np

from sbv2_jax.errors import InputError

MAX_BYTES = 4096  # of a line: far over the 77 tokens that any text tower reads
_CHUNK = 1 << 19
_END = re.compile(rb"[\r\n]")
_STRIDE = 16  # the index holds every 16th prompt: 0.5 bytes a prompt, and a read walks 8 lines on average


def _dropped() -> dict[int, None]:
    """Returns the characters that no prompt keeps, as a table for `str.translate`.

    Control characters (but for white space, which becomes one space), bidirectional marks and overrides, the
    zero-width space and the byte order mark. The zero-width joiners stay: Indic scripts and emoji need them.
    """
    controls = [c for c in range(0xA0) if unicodedata.category(chr(c)) == "Cc" and not chr(c).isspace()]
    bidi = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    return dict.fromkeys([*controls, *bidi, 0x200B, 0xFEFF])


_DROPPED = _dropped()


def clean(text: str) -> str:
    """Returns the prompt without control and bidirectional characters, white space collapsed to one space."""
    if not (text.isascii() and text.isprintable()):  # else there is nothing to drop
        text = text.translate(_DROPPED)
    return " ".join(text.split())


def decode(data: bytes) -> str:
    """Returns the clean prompt in the first 4,096 bytes of `data`; raises UnicodeDecodeError."""
    cut = len(data) > MAX_BYTES
    # Not final where cut: a character that the cut divides is left away, not an error.
    return clean(codecs.getincrementaldecoder("utf-8")().decode(data[:MAX_BYTES], final=not cut))


def clean_text(text: str) -> str:
    """Returns a prompt as it would be read from a file: `decode` of its bytes; raises UnicodeEncodeError."""
    return decode(text.encode("utf-8"))


class TextPrompts:
    """A random-access source of `str` over a text file: prompt i is the i-th line that is not blank.

    Lines end in LF, CRLF or CR; a byte order mark is skipped; of a line only the first 4,096 bytes are read;
    control and bidirectional characters are dropped (see `clean`).
    Raises InputError for a missing or empty file, blank lines only, and, with its number, a line that is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._map = self._open()
        self._index, self._length, self._fingerprint = self._build()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> str:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(f"prompt {index} of {self._length}")
        start = int(self._index[index // _STRIDE])
        skip = index % _STRIDE
        while True:
            end = self._line_end(start)
            text = self._text(start, end)
            if text:
                if not skip:
                    return text
                skip -= 1
            start = end + 1

    def __repr__(self) -> str:
        return f"TextPrompts({self._path!r}, {self._length} prompts)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map = self._open()

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the file."""
        return self._fingerprint

    def _open(self) -> mmap.mmap:
        try:
            with open(self._path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read as a prompt file: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{self._path}: the prompt file is empty: write one prompt a line") from error

    def _line_end(self, start: int) -> int:
        # Between CR and LF this finds an empty line, which is blank and no prompt.
        end = _END.search(self._map, start)
        return end.start() if end else len(self._map)

    def _text(self, start: int, end: int) -> str:
        """Returns the prompt in these bytes, "" for a blank line; raises UnicodeDecodeError."""
        return decode(self._map[start : min(end, start + MAX_BYTES + 1)])

    def _build(self) -> tuple[np.ndarray, int, str]:
        """Reads the file once: offsets of every 16th prompt, number of prompts, SHA-256."""
        offsets, total, line_number = [], 0, 1
        digest = hashlib.sha256()
        for starts, ends, plain in self._chunks(digest):
            keep = plain.copy()
            # A long line may be blank in the bytes that are read of it.
            for at in np.flatnonzero(~plain | (ends - starts > MAX_BYTES)):
                try:
                    keep[at] = bool(self._text(int(starts[at]), int(ends[at])))
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{self._path}, line {line_number + int(at)}: not UTF-8: save the file as UTF-8"
                    ) from error
            kept = starts[keep]
            offsets.append(kept[-total % _STRIDE :: _STRIDE].copy())  # a view would keep all of them
            total += len(kept)
            line_number += len(starts)
        if not total:
            raise InputError(
                f"{self._path}: no prompts, only {line_number - 1} blank lines: write one prompt a line"
            )
        return np.concatenate(offsets), total, digest.hexdigest()

    def _chunks(self, digest: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (starts, ends, plain) of runs of whole lines, int64, int64, bool: [lines].

        `plain` lines need no closer look: their run is UTF-8 and they hold a printable ASCII character. The
        others do.
        """
        size = len(self._map)
        at = len(codecs.BOM_UTF8) if self._map[:3] == codecs.BOM_UTF8 else 0
        digest.update(self._map[:at])
        while at < size:
            stop = min(at + _CHUNK, size)
            if stop < size:
                newline = max(self._map.rfind(end, at, stop) for end in (b"\n", b"\r"))
                stop = newline + 1 if newline >= 0 else min(self._line_end(at) + 1, size)
                if self._map[stop - 1 : stop + 1] == b"\r\n":
                    stop += 1
            if stop - at > _CHUNK:  # one line, longer than a chunk
                for piece in range(at, stop, _CHUNK):
                    digest.update(self._map[piece : min(piece + _CHUNK, stop)])
                end = self._line_end(at)
                yield np.array([at]), np.array([end]), np.array([False])
            else:
                chunk = self._map[at:stop]
                digest.update(chunk)
                yield _lines(chunk, at)
            at = stop


def _lines(chunk: bytes, at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data = np.frombuffer(chunk, np.uint8)
    newline = data == ord("\n")
    if b"\r" in chunk:
        newline[:-1] |= (data[:-1] == ord("\r")) & ~newline[1:]  # CRLF is one end, its CR blank in the line
        newline[-1] |= data[-1] == ord("\r")
    ends = np.flatnonzero(newline)
    if not newline[-1]:  # the last line of the file
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1] + 1])
    printable = np.logical_or.reduceat((data > 0x20) & (data < 0x7F), starts)
    try:
        chunk.decode("utf-8")
    except UnicodeDecodeError:
        printable[:] = False
    return starts + at, ends + at, printable
