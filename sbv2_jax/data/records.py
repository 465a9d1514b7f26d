"""Prompts from array_record files, bare or of a TFDS directory."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import SupportsIndex

from sbv2_jax.convert.formats.files import read_json
from sbv2_jax.data.text_prompts import decode
from sbv2_jax.errors import InputError


class RecordPrompts:
    """A random-access source of `str` over array_record files.

    `caption_of` turns a record (bytes) into a prompt (bytes); without it the record is the prompt. The rules
    of `TextPrompts` for length and characters hold; a record that is unreadable, blank or not UTF-8 raises
    InputError with its number when it is read.
    """

    def __init__(self, files: list[Path], caption_of: Callable[[bytes], bytes] | None = None):
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


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def tfds_files(path: Path, split: str) -> list[Path]:
    """Returns the files of one split of a TFDS directory; raises InputError for one that is broken."""
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


def tfds_caption(path: Path, column: str = "caption") -> Callable[[bytes], bytes]:
    """Returns a function from a record of this TFDS directory to one of its features; no picture is decoded."""
    import tensorflow_datasets as tfds

    try:
        features = tfds.features.FeaturesDict.from_config(str(path))
    except Exception as error:  # tfds raises whatever the parsing met
        raise InputError(f"{path}: its features.json cannot be read: {_line(error)}") from error
    if column not in features:
        raise InputError(f"{path}: its features {sorted(features)} have no {column}")
    captions = tfds.features.FeaturesDict({column: features[column]})
    return lambda record: captions.deserialize_example_np(record)[column]
