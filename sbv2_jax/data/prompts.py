"""Prompts for distillation: sources of text, and the endless stream of batches that training reads."""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex

import grain

from sbv2_jax.convert.formats.files import read_json
from sbv2_jax.data.text_prompts import TextPrompts, decode
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair

_COUNTED = 10_000


class PromptSource(Protocol):
    """A random-access source of prompts (grain's protocol) that can say what it holds."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> str: ...

    def fingerprint(self) -> str:
        """Returns a SHA-256 over everything that decides which prompt has which index."""
        ...


def open_prompts(path: str | os.PathLike, split: str = "train") -> PromptSource:
    """Returns the prompt source at `path`.

    "openmoji" or "openmoji:COUNT": captions of the OpenMoji world (50,000 without a count). A directory with
    a dataset_info.json: the `caption` of that TFDS split. A directory of *.array_record* files, or one such
    file: a prompt a record, UTF-8. Anything else: a text file, one prompt a line (`TextPrompts`).
    Raises InputError for what is missing, empty or broken.
    """
    world = re.fullmatch(r"openmoji(?::(\d+))?", os.fspath(path))
    if world:
        from sbv2_jax.openmoji.world import Captions

        return Captions(int(world[1])) if world[1] else Captions()
    path = Path(path).expanduser()
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return RecordPrompts(_tfds_files(path, split), _tfds_caption(path))
    if path.is_dir():
        files = sorted(path.glob("*.array_record*"))
        if not files:
            raise InputError(f"{path}: a directory without array_record files: give a text file of prompts")
        return RecordPrompts(files)
    if ".array_record" in path.name:
        return RecordPrompts([path])
    return TextPrompts(path)


class RecordPrompts:
    """A random-access source of `str` over array_record files.

    `caption_of` turns a record (bytes) into a prompt (bytes); without it the record is the prompt. The rules
    of `TextPrompts` for length and characters hold; a record that is unreadable, blank or not UTF-8 raises
    InputError with its number when it is read.
    """

    def __init__(self, files: list[Path], caption_of=None):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._files, self._caption_of = [os.fspath(file) for file in files], caption_of
        try:
            self._records = ArrayRecordDataSource(self._files)
            self._length = len(self._records)
        except Exception as error:  # array_record raises bare C++ errors of several types
            raise InputError(f"{self._files[0]}: not a whole array_record file: {_line(error)}") from error
        if not self._length:
            raise InputError(f"{self._files[0]}: holds no records")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> str:
        index = int(index)
        try:
            record = self._records[index]
            prompt = decode(self._caption_of(record) if self._caption_of else record)
        except IndexError:
            raise
        except Exception as error:
            raise InputError(f"{self._files[0]}, record {index}: {_line(error)}") from error
        if not prompt:
            raise InputError(f"{self._files[0]}, record {index}: a blank prompt: leave the record out")
        return prompt

    def __repr__(self) -> str:
        return f"RecordPrompts({self._files[0]!r}, {self._length} prompts)"

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the contents of the files, in their order."""
        digest = hashlib.sha256()
        for file in self._files:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


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


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _tfds_files(path: Path, split: str) -> list[Path]:
    info = read_json(path / "dataset_info.json")
    if info.get("fileFormat") != "array_record":
        raise InputError(f"{path}: a TFDS directory in another format: prepare it with array_record")
    try:
        splits = [str(one["name"]) for one in info["splits"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'dataset_info.json'} names no splits") from error
    if split not in splits:
        raise InputError(f"{path}: no split {split!r}: it has {', '.join(splits)}")
    files = sorted(path.glob(f"*-{split}.array_record*"))
    if not files:
        raise InputError(f"{path}: its split {split!r} has no array_record files here")
    return files


def _tfds_caption(path: Path):
    """Returns a function from a record of this TFDS directory to its caption; no picture is decoded."""
    import tensorflow_datasets as tfds

    try:
        features = tfds.features.FeaturesDict.from_config(str(path))
    except Exception as error:  # tfds raises whatever the parsing met
        raise InputError(f"{path}: its features.json cannot be read: {_line(error)}") from error
    if "caption" not in features:
        raise InputError(f"{path}: its features {sorted(features)} have no caption")
    captions = tfds.features.FeaturesDict({"caption": features["caption"]})
    return lambda record: captions.deserialize_example_np(record)["caption"]


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
    prompts = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # The stream is endless; without drop_remainder its length overflows at one prompt a batch.
    stream = prompts.batch(local, drop_remainder=True, batch_fn=list)
    mine = stream[start_step * process_count + process_index :: process_count]
    ahead = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(mine.to_iter_dataset(ahead))
