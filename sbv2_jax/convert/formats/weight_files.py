"""The weight files of one model: one safetensors file, or several and an index, in the hub's naming."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sbv2_jax.convert.formats.files import file_of, read_json, write_json
from sbv2_jax.convert.formats.safetensors_io import (
    PICKLE_SUFFIXES,
    TensorInfo,
    read_header,
    read_tensors,
    write_file,
)
from sbv2_jax.errors import InputError, listed

MAX_SHARD_BYTES = 10 * 10**9  # as diffusers


class Weights(NamedTuple):
    """The tensors of a model's files, none of them read yet: type, shape and file of each."""

    infos: dict[str, TensorInfo]
    files: dict[str, Path]

    def read(self, names: Collection[str], *, mapped: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of these names, file by file and in the order of the file's bytes.

        `mapped` is explained at `safetensors_io.read_tensors`.
        """
        for path in dict.fromkeys(self.files.values()):
            wanted = [name for name in self.infos if name in names and self.files[name] == path]
            yield from read_tensors(path, {name: self.infos[name] for name in wanted}, mapped=mapped)


def open_weights(directory: Path, stem: str) -> Weights:
    """Finds the weights `<stem>.safetensors`, or those of `<stem>.safetensors.index.json`, and checks them.

    The plain files are taken, and those of a variant (`<stem>.fp16.safetensors`) only where there are no others.
    Raises InputError for no file, several variants, a pickle in place of the file, and everything that `file_of`,
    `read_header` and the index refuse.
    """
    path = file_of(directory, _choose(directory, stem))
    if path.name.endswith(".json"):
        return _open_shards(directory, path)
    infos = read_header(path)
    return Weights(infos, dict.fromkeys(infos, path))


def _choose(directory: Path, stem: str) -> str:
    """Returns the name of the file, or of the index, to read."""
    names = sorted(path.name for path in directory.iterdir())
    # fp16 stands before the suffix: stem.fp16.safetensors, stem.safetensors.index.fp16.json
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<file>\w+))?\.safetensors|"
        rf"{re.escape(stem)}\.safetensors\.index(?:\.(?P<index>\w+))?\.json"
    )
    found: dict[str, str] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            of = match["file"] or match["index"] or ""
            # Where there are both, the libraries of the hub take the one file too.
            if of not in found or name.endswith(".safetensors"):
                found[of] = name
    if "" in found:
        return found[""]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise InputError(f"{directory} has {', '.join(found.values())}: move all but the wanted one away")
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise InputError(
            f"{directory} has weights as pickles only ({', '.join(pickles)}), which can run code: only "
            "safetensors files are read; save the model again with safe_serialization=True"
        )
    raise InputError(f"{directory} has no {stem}.safetensors")


def _open_shards(directory: Path, index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map from names of tensors to files")
    infos: dict[str, TensorInfo] = {}
    files: dict[str, Path] = {}
    wrong = []
    for shard in sorted(set(weight_map.values())):
        # Also for a name with another suffix: the error of a pickle is the plainer one.
        if not shard.endswith((".safetensors", *PICKLE_SUFFIXES)):
            raise InputError(f"{index}: {shard!r} is not the name of a safetensors file")
        path = file_of(directory, shard)
        header = read_header(path)
        wrong += [
            f"{ascii(name)} is in {files[name].name} and in {shard}" for name in header if name in files
        ]
        wrong += [
            f"{ascii(name)} is in {shard}, not in the index" for name in header if name not in weight_map
        ]
        infos = header | infos
        files = dict.fromkeys(header, path) | files
    wrong += [
        f"{ascii(name)} is not in {shard}"
        for name, shard in weight_map.items()
        if name not in files or files[name].name != shard
    ]
    if wrong:
        raise InputError(f"{index} does not fit its files in {len(wrong)} tensors: {listed(wrong)}")
    return Weights(infos, files)


def write_weights(
    directory: Path,
    stem: str,
    infos: Mapping[str, TensorInfo],
    tensor: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `<stem>.safetensors`, or shards of at most `max_shard_bytes` with their index, tensor by tensor.

    A tensor larger than the limit has a shard of its own. `tensor(name)` is called once for each of `infos`.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = total = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled, total = filled + info.nbytes, total + info.nbytes
    if len(shards) == 1:
        write_file(directory / f"{stem}.safetensors", infos, tensor)
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_file(directory / file, shard, tensor)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    write_json(
        directory / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
