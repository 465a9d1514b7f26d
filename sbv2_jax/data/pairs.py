"""Pairs of noise and what a teacher draws of it, as `launch/pairs.py` leaves them: the manifest, shards, records."""

import hashlib
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.checkpoint.manifest import json_digest
from sbv2_jax.convert.formats.files import existing_directory, file_of, read_json
from sbv2_jax.data.rows import Row
from sbv2_jax.distill.terms.regression import LATENTS, NUMBERS, SEEDS
from sbv2_jax.errors import InputError, listed

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = ("float16", "float32")
# A record: the pair's number, its latent in C order, its prompt in UTF-8; numbers little-endian.
_NUMBER = struct.Struct("<I")
# What a manifest says, and of which type; "shards", of those that are finished, comes last.
_TYPES = {
    "format": int,
    "count": int,
    "seed": int,
    "steps": int,
    "guidance": float,
    "sampler": str,
    "precision": str,
    "dtype": str,
    "latent_shape": list,
    "shard_size": int,
    "prompts": str,
    "made_from": dict,
}


def shard_names(count: int, shard_size: int) -> list[str]:
    """Returns the names of the files of `count` pairs; number i is in file i // shard_size."""
    shards = math.ceil(count / shard_size)
    return [f"pairs-{number:05d}-of-{shards:05d}.array_record" for number in range(shards)]


def pack(number: int, latent: np.ndarray, prompt: str) -> bytes:
    """Returns the record of a pair, whose latent has the dtype of the file."""
    return _NUMBER.pack(number) + np.ascontiguousarray(latent).tobytes() + prompt.encode("utf-8")


class Pairs:
    """A random-access source of pairs: prompt, teacher's latent, and the number and seed of its noise.

    The noise of pair i is `initial_noise(seed, [i], latent_shape)`. `directory` is what launch/pairs.py wrote; `name`
    begins each message. Raises InputError for a manifest that is none, an unfinished set and missing shards, and
    with its number, when it is read, for a pair that is not what the manifest says.
    """

    def __init__(self, directory: str | Path, name: str = ""):
        self._name = f"{name}{directory}"
        self._directory = existing_directory(directory)
        self.manifest = read_manifest(self._directory)
        if not (shards := self.manifest.get("shards")):
            raise InputError(
                f"{self._name}: its pairs are not finished: run the launch/pairs.py that made them once more"
            )
        self.made_from = self.manifest["made_from"]
        self._shape = tuple(self.manifest["latent_shape"])
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        missing = [shard for shard in sorted(shards) if not (self._directory / shard).is_file()]
        if missing:
            raise InputError(
                f"{self._name}: {len(missing)} of its {len(shards)} shards are missing: {listed(missing)}"
            )
        self._files = [file_of(self._directory, shard) for shard in sorted(shards)]
        self._records = self._opened()

    def _opened(self) -> Sequence[bytes]:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            records = ArrayRecordDataSource([str(file) for file in self._files])
            found = len(records)
        except Exception as error:  # array_record raises bare C++ errors of several types
            raise InputError(
                f"{self._name}: a shard is not a whole array_record file: {_line(error)}"
            ) from error
        if found != self.manifest["count"]:
            raise InputError(
                f"{self._name}: {found} pairs in its shards; its {MANIFEST} says {self.manifest['count']}"
            )
        return records

    def __len__(self) -> int:
        return self.manifest["count"]

    def __repr__(self) -> str:
        return f"Pairs({str(self._directory)!r}, {len(self)} pairs)"

    def __getitem__(self, index: SupportsIndex) -> Row:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        end = _NUMBER.size + math.prod(self._shape) * self._dtype.itemsize
        try:
            record = self._records[index]
            (number,) = _NUMBER.unpack_from(record)
            latent = np.frombuffer(record[_NUMBER.size : end], self._dtype).reshape(self._shape)
            prompt = record[end:].decode("utf-8")
        except Exception as error:  # array_record raises bare C++ errors of several types
            raise InputError(f"{self._name}, pair {index}: {_line(error)}") from error
        if number != index or not prompt or not np.isfinite(latent).all():
            raise InputError(f"{self._name}, pair {index}: its record is not that of this pair")
        columns: dict[str, np.ndarray | np.generic] = {
            NUMBERS: np.int32(number),
            SEEDS: np.uint32(self.manifest["seed"]),
            LATENTS: latent.astype(np.float32),
        }
        return Row(prompt, columns)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the manifest, which holds those of the shards.

        Raises InputError for a shard whose content is another.
        """
        wrong = [file.name for file in self._files if sha256_of(file) != self.manifest["shards"][file.name]]
        if wrong:
            raise InputError(f"{self._name}: other content than its {MANIFEST} says: {listed(wrong)}")
        return json_digest(self.manifest)


def open_pairs(config: ConfigDict) -> Pairs:
    """Returns the pairs of a run, `config.pairs.path`."""
    return Pairs(Path(config.pairs.path).expanduser(), "config.pairs.path = ")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns what is said of the pairs in a directory; raises InputError for what launch/pairs.py did not write."""
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory} has no {MANIFEST}: it is not what launch/pairs.py wrote")
    found = read_json(path)
    wrong = [name for name, kind in _TYPES.items() if type(found.get(name)) is not kind]
    if wrong:
        raise InputError(f"{path} is not of pairs: {', '.join(wrong)} missing or of another type")
    if found["format"] != FORMAT:
        raise InputError(f"{path} has format {found['format']}; {FORMAT} is read here")
    shape, shards = found["latent_shape"], found.get("shards", {})
    names = shard_names(found["count"], found["shard_size"]) if found["shard_size"] > 0 else []
    right = {
        "count": found["count"] > 0,
        "shard_size": found["shard_size"] > 0,
        "seed": 0 <= found["seed"] < 2**32,
        "dtype": found["dtype"] in DTYPES,
        "latent_shape": len(shape) == 3 and all(type(side) is int and side > 0 for side in shape),
        "shards": isinstance(shards, dict) and (not shards or sorted(shards) == names),
    }
    if wrong := [name for name, good in right.items() if not good]:
        raise InputError(f"{path} is not of pairs: wrong {', '.join(wrong)}")
    return found


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
