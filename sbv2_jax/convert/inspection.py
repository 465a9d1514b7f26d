"""What is in a model's files, tensor by tensor, and where two models differ."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sbv2_jax.convert.formats.component import load_config
from sbv2_jax.convert.formats.legacy import current_names
from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.convert.formats.orbax_files import has_params, read_params
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.safetensors_io import DTYPES, TensorInfo, read_header
from sbv2_jax.convert.formats.weight_files import open_weights
from sbv2_jax.models.registry import class_of, network

_CHUNK = 1 << 24
_TYPES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """The format's name of a type, the shape, the bytes, and the SHA-256 of the bytes in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str


def tensors(model: str | Path) -> dict[str, Tensor]:
    """Returns every tensor of a safetensors file, a network's directory or a pipeline, by its name.

    Of a network, names that older libraries wrote are given as today's; in a pipeline they begin with the
    network's folder. Raises InputError for what cannot be read.
    """
    if Path(model).is_file() or str(model).endswith(".safetensors"):
        return _of_file(Path(model), read_header(Path(model)))
    directory = resolve(model)
    if (directory / "model_index.json").exists():
        opened = load_pipeline(directory)
        return {
            f"{part}.{name}": tensor
            for part in opened.configs
            for name, tensor in _of_network(opened.component_dir(part)).items()
        }
    return _of_network(directory)


def _of_network(directory: Path) -> dict[str, Tensor]:
    config = load_config(directory)
    if has_params(directory):
        return _of_params(read_params(directory, network(config).shapes))
    weights = open_weights(directory, config.STEM)
    today = current_names(class_of(config), weights.infos, str(directory))
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(weights.files.values()):
        # Where a tensor ends is where the next one of its file begins.
        found |= _of_file(path, read_header(path))
    return {today.get(name, name): tensor for name, tensor in found.items()}


def _of_params(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Describes parameters as the safetensors file that they would make, so that the two can be compared."""
    found = {}
    for name, array in params_to_torch(params).items():
        digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        found[name] = Tensor(_TYPES[array.dtype], array.shape, array.nbytes, digest)
    return found


def _of_file(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    ends = [*(info.offset for info in infos.values()), path.stat().st_size][1:]
    found = {}
    with open(path, "rb") as file:
        for (name, info), end in zip(infos.items(), ends, strict=True):
            digest, left = hashlib.sha256(), end - info.offset
            file.seek(info.offset)
            while left:
                data = file.read(min(left, _CHUNK))
                digest.update(data)
                left -= len(data)
            found[name] = Tensor(info.dtype, info.shape, end - info.offset, digest.hexdigest())
    return found


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Returns one line for every tensor that only one of two models has, or that is not the same in both."""
    lines = [f"{name}: only in the first" for name in first if name not in second]
    lines += [f"{name}: only in the second" for name in second if name not in first]
    for name in first:
        if name not in second or first[name] == second[name]:
            continue
        ours, theirs = first[name], second[name]
        if ours[:2] != theirs[:2]:
            lines.append(f"{name}: {ours.dtype} {ours.shape} and {theirs.dtype} {theirs.shape}")
        else:
            lines.append(f"{name}: other values")
    return sorted(lines)


def report(model: str | Path, other: str | Path | None = None) -> Iterator[str]:
    """Yields the lines that `inspect` prints: the tensors of one model, or the differences of two."""
    first = tensors(model)
    if other is None:
        for name, tensor in sorted(first.items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.nbytes} {tensor.sha256}"
        yield f"{len(first)} tensors, {sum(tensor.nbytes for tensor in first.values())} bytes"
        return
    second = tensors(other)
    lines = differences(first, second)
    yield from lines
    yield f"{len(lines)} of {len(first.keys() | second.keys())} tensors differ"
