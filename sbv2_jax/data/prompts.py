"""Prompts for distillation: sources of text, and the endless stream of batches that training reads."""

import bisect
import functools
import glob
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex, TypeVar

import grain
from grain.sources import RandomAccessDataSource

from sbv2_jax.data import tables
from sbv2_jax.data.columns import HOW
from sbv2_jax.data.kinds import Kind, kind_of, looks_like_table
from sbv2_jax.data.named import named_source
from sbv2_jax.data.records import RecordPrompts, tfds_caption, tfds_files
from sbv2_jax.data.spooled import SpooledPrompts
from sbv2_jax.data.streams import head_of, is_packed, lines
from sbv2_jax.data.text_prompts import TextPrompts
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair

T = TypeVar("T")
_COUNTED = 10_000
_READERS = {Kind.TABLE: tables.table, Kind.JSON: tables.objects, Kind.PARQUET: tables.parquet}


class PromptSource(Protocol):
    """A random-access source of prompts (grain's protocol) that can say what it holds.

    It may have `notes`, lines for the user on how it was read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> str: ...

    def fingerprint(self) -> str:
        """Returns a SHA-256 over everything that decides which prompt has which index."""
        ...


def open_prompts(place: str | os.PathLike, column: str = "", split: str = "train") -> PromptSource:
    """Returns the prompt source at `place`; several, with commas between them, are read one after the other.

    - A file: text with a prompt a line, CSV or TSV, JSON, JSON Lines or Parquet, also compressed (`kinds`); or a
      pattern of files, such as `data/*.parquet`, in the order of their names.
    - A directory with a dataset_info.json: the `caption` of that TFDS split. A directory of *.array_record*
      files, or one such file: a prompt a record, UTF-8.
    - "openmoji" or "openmoji:COUNT": captions of the OpenMoji world (50,000 without a count). A source of your
      own by its dotted path (`named`).

    `column` names the column or key of the prompts where there are several, and none has a usual name.
    Raises InputError for what is missing, empty, broken, or of a format that is not read.
    """
    sources = [_open(one, column, split) for one in places(os.fspath(place))]
    return sources[0] if len(sources) == 1 else JoinedPrompts(sources)


def places(place: str) -> list[str]:
    """Returns what a name stands for, one by one: a path that exists, a pattern, or several with commas."""
    found = []
    for part in [place] if _exists(place) else place.split(","):
        one = os.path.expanduser(part.strip())
        if not one:
            raise InputError(f"{place!r}: a name of prompts is empty")
        if _exists(one) or not glob.has_magic(one):
            found.append(one)
            continue
        matches = sorted(glob.glob(one, recursive=True))
        if not matches:
            raise InputError(f"{one}: no file fits this pattern")
        found += matches
    return found


def _exists(place: str) -> bool:
    return os.path.exists(os.path.expanduser(place))


def _open(place: str, column: str, split: str) -> PromptSource:
    if (source := None if os.path.exists(place) else named_source(place)) is not None:
        return _without_columns(source, place, column)
    path = Path(place)
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return RecordPrompts(tfds_files(path, split), tfds_caption(path, column or "caption"))
    if path.is_dir():
        files = sorted(path.glob("*.array_record*"))
        if not files:
            raise InputError(
                f"{path}: a directory without array_record files: name its files of prompts, such as "
                f"{path / '*.parquet'}"
            )
        return _without_columns(RecordPrompts(files), place, column)
    if ".array_record" in path.name:
        return _without_columns(RecordPrompts([path]), place, column)
    return open_file(path, column)


def open_file(path: str | os.PathLike, column: str = "") -> TextPrompts:
    """Returns the prompts of one file, of any of the `kinds`; raises InputError as `open_prompts` does."""
    path = Path(path)
    notes: list[str] = []
    again = functools.partial(open_file, path, column)
    kind = kind_of(path)
    if kind is Kind.TEXT:
        columns = looks_like_table(head_of(path).decode("utf-8", errors="replace"))
        if columns and not column:
            raise InputError(f"{path}: a table of {', '.join(columns)}, by its first rows: {HOW}")
        if column:
            kind = Kind.TABLE
        elif not is_packed(path):
            return TextPrompts(path)
        else:
            values = ((f"line {number}", line) for number, line in lines(path))
            return SpooledPrompts(path, values, notes, again)
    return SpooledPrompts(path, _READERS[kind](path, column, notes), notes, again)


def _without_columns(source: PromptSource, place: str, column: str) -> PromptSource:
    if column:
        raise InputError(f"{place}: has no columns, and so no {column!r}")
    return source


class JoinedPrompts:
    """Several sources as one, in their order."""

    def __init__(self, sources: Sequence[PromptSource]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        self.notes = tuple(note for source in sources for note in notes_of(source))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> str:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which][index - (self._ends[which - 1] if which else 0)]

    def __repr__(self) -> str:
        return f"JoinedPrompts({len(self._sources)} sources, {len(self)} prompts)"

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the fingerprints of the sources and their lengths."""
        parts = [f"{source.fingerprint()}/{len(source)}" for source in self._sources]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def notes_of(source: PromptSource) -> tuple[str, ...]:
    """Returns the lines that say how a source was read, such as the column that was guessed; ten at most."""
    notes = tuple(getattr(source, "notes", ()))
    return notes if len(notes) <= 10 else (*notes[:10], f"and {len(notes) - 10} more such files")


def describe_cut(prompts: Sequence[str] | PromptSource, tokenizer: Tokenizer | TokenizerPair) -> str | None:
    """Returns the line that says how many prompts a tokenizer cuts, None where it cuts none.

    Of more than 10,000 prompts it counts 10,000 spread evenly; reading them raises InputError as the source does.
    """
    stride = math.ceil(len(prompts) / _COUNTED)
    some = [prompts[index] for index in range(0, len(prompts), stride)]
    cut = tokenizer.count_truncated(some)
    if not cut:
        return None
    of = "" if stride == 1 else f" looked at, of {len(prompts)},"
    return f"{cut} of {len(some)} prompts{of} are longer than {tokenizer.max_length} tokens and are cut"


def shuffled(source: RandomAccessDataSource[T], seed: int) -> grain.MapDataset[T]:
    """Returns a source's items without end, by random access: every epoch is a new permutation, from the seed."""
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def prompt_batches(
    source: PromptSource,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> Iterator[list[str]]:
    """Yields this process's prompts of global step `start_step`, `start_step` + 1, ... without end.

    `batch_size` is global; each process gets `batch_size / process_count` prompts, and the processes' lists,
    joined in their order, are the same whatever their number. Every epoch is a new permutation, and a batch
    may span two. The position comes from the step alone, so a resumed run goes on exactly. `prefetch` batches
    are read ahead in a thread (0: none). Raises InputError when the prompts do not fill a batch, or the
    processes do not divide it.
    """
    if len(source) < batch_size:
        raise InputError(
            f"{source!r}: fewer prompts than the batch size {batch_size}: add prompts or lower batch_size"
        )
    if batch_size % process_count:
        raise InputError(f"batch_size {batch_size}: not divisible by the {process_count} processes")
    local = batch_size // process_count
    prompts = shuffled(source, seed)
    # The stream is endless; without drop_remainder its length overflows at one prompt a batch.
    stream = prompts.batch(local, drop_remainder=True, batch_fn=list)
    mine = stream[start_step * process_count + process_index :: process_count]
    ahead = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(mine.to_iter_dataset(ahead))
