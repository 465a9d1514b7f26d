"""Files of `torch.save`, a state dict of tensors in either of its two formats, read without running their pickle.

Since PyTorch 1.6 such a file is a zip archive with the bytes of every storage in a file of its own. Before, it was
five pickles one after the other, and then the storages. Networks of those years were never saved again.
"""

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sbv2_jax.convert.formats.pickle_data import read_pickle
from sbv2_jax.errors import InputError

_ZIP_START = b"PK\x03\x04"
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that `torch.save` wrote, by name.

    The file holds a dictionary of tensors, or one under the key `state_dict`; entries that are no tensors are left
    out. Nothing of the pickle is imported or called (`pickle_data`). Raises InputError that names the file for one
    of another kind, a broken one, and one whose tensors do not lie within their storages.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(_ZIP_START)) == _ZIP_START
            file.seek(0)
            found, bytes_of = (_open_zip if zipped else _open_legacy)(file, str(path))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile raises whatever it met, and so do values that torch never writes
        raise InputError(f"{path} cannot be read as a file of torch.save: {error}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no dictionary of tensors")
    tensors = {name: one for name, one in state.items() if isinstance(one, _Tensor) and isinstance(name, str)}
    if not tensors:
        raise InputError(f"{path} holds no tensors by name")
    return {name: _array(name, one, bytes_of, str(path)) for name, one in tensors.items()}


def _open_zip(file: BinaryIO, source: str) -> tuple[Any, Mapping[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickles = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any(info.compress_type for info in archive.infolist()):
            raise InputError(f"{source} is no archive of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if sizes.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
            raise InputError(f"{source} was saved on a machine of the other byte order")
        storages: dict[str, _Storage] = {}
        data = io.BytesIO(archive.read(pickles[0]))
        found = read_pickle(data, source, known=_known(), persistent=_persistent(storages))
        return found, {key: archive.read(f"{root}data/{key}") for key in storages}


def _open_legacy(file: BinaryIO, source: str) -> tuple[Any, Mapping[str, bytes]]:
    if file.read(len(_LEGACY_START)) != _LEGACY_START:
        raise InputError(f"{source} is no file of torch.save")
    read_pickle(file, source)  # the protocol's number, which never changed
    if not read_pickle(file, source).get("little_endian"):
        raise InputError(f"{source} was saved on a machine of the other byte order")
    storages: dict[str, _Storage] = {}
    found = read_pickle(file, source, known=_known(), persistent=_persistent(storages))
    size, bytes_of = os.fstat(file.fileno()).st_size, {}
    for key in read_pickle(file, source):
        if len(length := file.read(8)) != 8:
            raise InputError(f"{source} is truncated: the storage {key!r} is missing")
        count = int.from_bytes(length, "little")
        if key not in storages or count != storages[key].count:
            raise InputError(f"{source}: the storage {key!r} is not the one that its tensors name")
        bytes_of[key] = file.read(min(count * storages[key].dtype.itemsize, size))
    return found, bytes_of


def _known() -> dict[str, Callable]:
    """Returns what stands for the names that a state dict's pickle holds."""
    types = {f"torch {name}": _type(np.dtype(dtype)) for name, dtype in _STORAGES.items()}
    return types | {
        "collections OrderedDict": _dictionary,
        "torch._utils _rebuild_tensor": _tensor,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch._utils _rebuild_parameter": _parameter,
    }


def _type(dtype: np.dtype) -> Callable[[], np.dtype]:
    return lambda: dtype


def _dictionary(items: Any = ()) -> dict:
    return dict(items)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(one) is not int or one < 0 for one in numbers):
        raise ValueError("a tensor of no storage, or of a shape that is none")
    if len(shape) != len(strides):
        raise ValueError("a tensor whose shape and strides differ in length")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _persistent(storages: dict[str, _Storage]) -> Callable[[Any], _Storage]:
    def storage(identifier: Any) -> _Storage:
        kind, dtype, key, _, count, *view = identifier
        if kind != "storage" or type(count) is not int or count < 0 or any(one is not None for one in view):
            raise ValueError(f"data that lies elsewhere, {kind!r}")
        found = _Storage(str(key), dtype(), count)
        return storages.setdefault(found.key, found)

    return storage


def _array(name: str, tensor: _Tensor, bytes_of: Mapping[str, bytes], source: str) -> np.ndarray:
    storage = tensor.storage
    data = bytes_of.get(storage.key, b"")
    if len(data) != storage.count * storage.dtype.itemsize:
        raise InputError(f"{source} is truncated: {ascii(name)} lacks its values")
    values = np.frombuffer(data, storage.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((length - 1) * stride for length, stride in steps)
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, storage.dtype)
    # As many values as the storage has, so that a stride of 0 cannot make gigabytes of a few bytes.
    if last >= storage.count or math.prod(tensor.shape) > storage.count:
        raise InputError(f"{source}: {ascii(name)} reaches out of its storage")
    strides = [stride * values.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)
