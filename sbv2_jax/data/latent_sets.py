"""A set of latents with their prompts: shards of array_record, and a manifest of what they were made from."""

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsIndex

import numpy as np

from sbv2_jax.checkpoint.manifest import json_digest
from sbv2_jax.convert.formats.files import existing_directory, file_of, read_json
from sbv2_jax.data.rows import Row
from sbv2_jax.errors import InputError, listed

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = ("float16", "float32")
# A record: its number, its latent in C order, its prompt in UTF-8; numbers little-endian.
_NUMBER = struct.Struct("<I")
# What every manifest says, and of which type; "shards", of those that are finished, comes last.
_TYPES = {
    "format": int,
    "count": int,
    "dtype": str,
    "latent_shape": list,
    "shard_size": int,
    "made_from": dict,
}


def shard_names(things: str, count: int, shard_size: int) -> list[str]:
    """Returns the names of the files of `count` records; number i is in file i // shard_size."""
    shards = math.ceil(count / shard_size)
    return [f"{things}-{number:05d}-of-{shards:05d}.array_record" for number in range(shards)]


def pack(number: int, latent: np.ndarray, prompt: str) -> bytes:
    """Returns a record, whose latent has the dtype of the file."""
    return _NUMBER.pack(number) + np.ascontiguousarray(latent).tobytes() + prompt.encode("utf-8")


class LatentSet:
    """A random-access source of rows, each with a prompt and a latent; a subclass says what it is of.

    `directory` is what `MAKER` wrote; `name` begins each message. `TYPES` are those of what else the manifest says.
    Raises InputError for a manifest that is none, an unfinished set and missing shards, and with its number, when it
    is read, for a record that is not what the manifest says.
    """

    THING: ClassVar[str]
    THINGS: ClassVar[str]
    MAKER: ClassVar[str]
    TYPES: ClassVar[Mapping[str, type]]

    def __init__(self, directory: str | Path, name: str = ""):
        self._name = f"{name}{directory}"
        self._directory = existing_directory(directory)
        self.manifest = self._read_manifest()
        if not (shards := self.manifest.get("shards")):
            raise InputError(
                f"{self._name}: its {self.THINGS} are not finished: run the {self.MAKER} that made them once more"
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

    def columns(self, number: int, latent: np.ndarray) -> dict[str, np.ndarray | np.generic]:
        """Returns the columns of a row with this latent, float32."""
        raise NotImplementedError

    def wrong(self, manifest: Mapping[str, Any]) -> list[str]:
        """Returns the names of what else a manifest says that cannot be."""
        return []

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
                f"{self._name}: {found} {self.THINGS} in its shards; its {MANIFEST} says {self.manifest['count']}"
            )
        return records

    def __len__(self) -> int:
        return self.manifest["count"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._directory)!r}, {len(self)} {self.THINGS})"

    def __getitem__(self, index: SupportsIndex) -> Row:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.THING} {index} of {len(self)}")
        end = _NUMBER.size + math.prod(self._shape) * self._dtype.itemsize
        try:
            record = self._records[index]
            (number,) = _NUMBER.unpack_from(record)
            latent = np.frombuffer(record[_NUMBER.size : end], self._dtype).reshape(self._shape)
            prompt = record[end:].decode("utf-8")
        except Exception as error:  # array_record raises bare C++ errors of several types
            raise InputError(f"{self._name}, {self.THING} {index}: {_line(error)}") from error
        if number != index or not prompt or not np.isfinite(latent).all():
            raise InputError(
                f"{self._name}, {self.THING} {index}: its record is not that of this {self.THING}"
            )
        return Row(prompt, self.columns(number, latent.astype(np.float32)))

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the manifest, which holds those of the shards.

        Raises InputError for a shard whose content is another.
        """
        wrong = [file.name for file in self._files if sha256_of(file) != self.manifest["shards"][file.name]]
        if wrong:
            raise InputError(f"{self._name}: other content than its {MANIFEST} says: {listed(wrong)}")
        return json_digest(self.manifest)

    def _read_manifest(self) -> dict[str, Any]:
        """Returns what is said of the set; raises InputError for what its maker did not write."""
        path = self._directory / MANIFEST
        if not path.is_file():
            raise InputError(f"{self._directory} has no {MANIFEST}: it is not what {self.MAKER} wrote")
        found, types = read_json(path), {**_TYPES, **self.TYPES}
        wrong = [name for name, kind in types.items() if type(found.get(name)) is not kind]
        if wrong:
            raise InputError(f"{path} is not of {self.THINGS}: {', '.join(wrong)} missing or of another type")
        if found["format"] != FORMAT:
            raise InputError(f"{path} has format {found['format']}; {FORMAT} is read here")
        shape, shards, size = found["latent_shape"], found.get("shards", {}), found["shard_size"]
        names = shard_names(self.THINGS, found["count"], size) if size > 0 else []
        right = {
            "count": found["count"] > 0,
            "shard_size": size > 0,
            "dtype": found["dtype"] in DTYPES,
            "latent_shape": len(shape) == 3 and all(type(side) is int and side > 0 for side in shape),
            "shards": isinstance(shards, dict) and (not shards or sorted(shards) == names),
        }
        if wrong := [name for name, good in right.items() if not good] + self.wrong(found):
            raise InputError(f"{path} is not of {self.THINGS}: wrong {', '.join(wrong)}")
        return found


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
