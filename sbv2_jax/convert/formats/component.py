"""One model directory, `config.json` and weights, to parameters and back.

The weights are safetensors files as diffusers and transformers write them, or an Orbax checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.checkpoint.finite import is_finite
from sbv2_jax.convert.formats import orbax_files
from sbv2_jax.convert.formats.files import existing_directory, file_of, new_directory, read_json, write_json
from sbv2_jax.convert.formats.finite import refuse_not_finite
from sbv2_jax.convert.formats.legacy import current_names, current_shape
from sbv2_jax.convert.formats.names import to_ours, to_torch, torch_name, torch_names
from sbv2_jax.convert.formats.published_shapes import family_text, torch_shape
from sbv2_jax.convert.formats.safetensors_io import DTYPES, TensorInfo
from sbv2_jax.convert.formats.weight_files import MAX_SHARD_BYTES, Weights, open_weights, write_weights
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.config import Kind, ModelConfig
from sbv2_jax.models.registry import class_name, class_of, config_class, network
from sbv2_jax.tree import Shapes, require_same


@dataclasses.dataclass(frozen=True, eq=False)
class Component(Generic[Kind]):
    """A model: its configuration, and its parameters as flat NumPy arrays in our names and axes."""

    config: Kind
    params: dict[str, np.ndarray]


def load_config(directory: str | Path) -> ModelConfig:
    """Reads the `config.json` of a model directory.

    Raises InputError for a missing directory or file, and for a class or field that is not supported.
    """
    path = file_of(existing_directory(directory), "config.json")
    values = read_json(path)
    name = class_name(values, str(path))
    config = config_class(name).from_dict(values, str(path))
    class_of(config)
    return config


def check_component(directory: str | Path) -> ModelConfig:
    """Reads the configuration of a model directory and compares what its weights' files say with it.

    Raises InputError as `load_component` does, before any tensor is read.
    """
    config, directory = load_config(directory), Path(directory)
    if orbax_files.has_params(directory):
        orbax_files.check_params(directory, network(config).shapes)
        return config
    weights = open_weights(directory, config.STEM)
    _match(class_of(config), weights, network(config).shapes, str(directory))
    return config


def weight_files(directory: str | Path) -> list[Path]:
    """Returns the files that `load_component` reads the weights of a model directory from.

    Raises InputError as it does for files that are missing or broken.
    """
    config, directory = load_config(directory), Path(directory)
    if orbax_files.has_params(directory):
        return [path for path in sorted((directory / orbax_files.FOLDER).rglob("*")) if path.is_file()]
    return list(dict.fromkeys(open_weights(directory, config.STEM).files.values()))


def load_component(directory: str | Path, *, dtype: Any | None = None) -> Component[ModelConfig]:
    """Loads a model directory, without network and without pickle.

    The parameters keep the file's types unless `dtype` (float32, bfloat16 or float16) is asked for; where no
    cast is needed those of safetensors are read-only views of the file. All checks come before the first tensor
    is read. Raises InputError that lists every missing and unexpected name, every wrong shape and type, in the
    names of the files; also for values that are NaN or infinite, and for one that `dtype` cannot hold.
    """
    directory = existing_directory(directory)
    dtype = None if dtype is None else _format_name(dtype)
    config = load_config(directory)
    if orbax_files.has_params(directory):
        stored = orbax_files.read_params(directory, network(config).shapes)
        refuse_not_finite([name for name in stored if not is_finite(stored[name])], str(directory))
        return Component(config, {name: _cast(name, stored[name], dtype) for name in sorted(stored)})
    weights = open_weights(directory, config.STEM)
    ours = _match(class_of(config), weights, network(config).shapes, str(directory))
    # What is cast is read and let go; the rest stays where it is, in the file.
    mapped = all(dtype in (None, weights.infos[name].dtype) for name in ours)
    params, wrong = {}, []
    for name, array in weights.read(ours.keys(), mapped=mapped):
        if not is_finite(array):
            wrong.append(name)
            continue
        array = array.reshape(current_shape(class_of(config), name, array.shape))
        if weights.infos[name].dtype not in DTYPES:
            array = array.astype(np.float32)  # a single number
        params[ours[name]] = _cast(ours[name], to_ours(ours[name], array), dtype)
    refuse_not_finite(wrong, str(directory))
    return Component(config, {name: params[name] for name in sorted(params)})


def declared_dtype(directory: str | Path) -> str | None:
    """Returns the `dtype` that the config.json of a model directory says; None where it says none."""
    values = read_json(file_of(existing_directory(directory), "config.json"))
    found = values.get("dtype", values.get("torch_dtype"))
    return found if isinstance(found, str) else None


def _match(class_name: str, weights: Weights, shapes: Shapes, source: str) -> dict[str, str]:
    """Returns our name of every parameter by its name in the file, having compared all of them."""
    current = current_names(class_name, weights.infos, source)
    ours = torch_names(shapes)
    found = set(current.values())
    wrong = [
        f"missing {name} {torch_shape(ours[name], shapes[ours[name]].shape)}"
        for name in ours
        if name not in found
    ]
    for name, today in current.items():
        info = weights.infos[name]
        if today not in ours:
            wrong.append(f"unexpected {ascii(name)[1:-1]} {info.shape}")
            continue
        shape = torch_shape(ours[today], shapes[ours[today]].shape)
        if current_shape(class_name, name, info.shape) != shape:
            wrong.append(f"{name} has shape {info.shape}, expected {shape}")
        if not info.readable:
            wrong.append(f"{name} has type {info.dtype}, expected one of {', '.join(DTYPES)}")
    if wrong:
        more = "" if len(wrong) <= 10 else f"; `convert.py inspect --model={source}` lists its tensors"
        stored = {
            today: current_shape(class_name, name, weights.infos[name].shape)
            for name, today in current.items()
        }
        raise InputError(
            f"{source} does not fit its config.json in {len(wrong)} tensors: {listed(wrong)}{more}"
            f"{family_text(class_name, stored)}"
        )
    return {name: ours[today] for name, today in current.items()}


def save_component(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray | jax.Array],
    *,
    dtype: Any | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model directory that the `from_pretrained` of diffusers or transformers loads.

    Types are kept unless `dtype` (float32, bfloat16 or float16) is asked for. Everything is written next to
    `directory` and renamed at the end. Raises InputError where the directory is not empty or cannot be
    written, for parameters that do not fit the configuration, and for values that `dtype` cannot hold.
    """
    with new_directory(directory) as partial:
        write_component(partial, config, params, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_component(
    directory: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray | jax.Array],
    *,
    dtype: Any | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    orbax: bool = False,
    declared: str | None = None,
) -> None:
    """Writes the files of `save_component`, or with `orbax` an Orbax checkpoint, into a directory that exists.

    The config.json of a transformers network says the `dtype` of its weights, since transformers loads them in
    what it says; `declared` is said in place of it. Of `params` one is asked for at a time, once, and let go: they may
    be anything with a shape and a dtype that NumPy makes an array of. Raises InputError as `save_component` does, and
    for values that are NaN or infinite; not atomic.
    """
    require_same(params, network(config).shapes, "the parameters given", class_of(config))
    dtype = None if dtype is None else _format_name(dtype)
    wrong: list[str] = []

    def tensor(name: str) -> np.ndarray:
        array = np.asarray(params[name])
        if not is_finite(array):
            wrong.append(torch_name(name))
        return array

    values = config.to_dict()
    if not config.CLASS_NAME:
        values["architectures"] = [class_of(config)]
        types = {str(DTYPES[dtype or _format_name(leaf.dtype)]) for leaf in params.values()}
        # None where the file has several, as no writer but a converter makes it
        values["dtype"] = declared or (types.pop() if len(types) == 1 else None)
    write_json(directory / "config.json", values)
    if orbax:
        arrays = {
            name: _cast(name, tensor(name), dtype or _format_name(leaf.dtype))
            for name, leaf in params.items()
        }
        refuse_not_finite(wrong, f"the {class_of(config)} to be written")
        orbax_files.write_params(directory, arrays)
        return
    infos = {
        torch_name(name): TensorInfo(dtype or _format_name(leaf.dtype), torch_shape(name, leaf.shape))
        for name, leaf in params.items()
    }
    ours = {torch_name(name): name for name in params}

    def written(name: str) -> np.ndarray:
        return _cast(ours[name], to_torch(ours[name], tensor(ours[name])), dtype)

    write_weights(directory, config.STEM, infos, written, max_shard_bytes=max_shard_bytes)
    refuse_not_finite(wrong, f"the {class_of(config)} to be written")


def _format_name(dtype: Any) -> str:
    """Returns the file format's name of a type; raises InputError for one that weights cannot have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    for name, known in DTYPES.items():
        if known == found:
            return name
    raise InputError(f"weights of type {dtype} are not supported (float32, bfloat16 or float16)")


def _cast(name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    if dtype is None or array.dtype == DTYPES[dtype]:
        return array
    try:
        with np.errstate(over="raise"):
            return array.astype(DTYPES[dtype])
    except FloatingPointError as error:
        raise InputError(f"{torch_name(name)} has values too large for {DTYPES[dtype]}") from error
