"""safetensors files, read strictly and written as a stream.

The safetensors library checks offsets and lengths. What it lets pass is refused here: keys
given twice, names that are paths, headers of a hundred megabytes, and pickles with another name.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sbv2_jax.convert.formats.files import parse_json
from sbv2_jax.errors import InputError

# In the order in which the safetensors library writes them.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# What a single number may be stored as besides: a scalar has no memory to save.
_NUMBERS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
# torch.save's two formats: a zip archive, and a bare pickle of protocol 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
# The library's own limit, 100 MB, takes gigabytes to parse; SDXL's header has 0.2 MB.
_MAX_HEADER_BYTES = 16 * 2**20
_ALIGNMENT = 8


class TensorInfo(NamedTuple):
    """What a header says of a tensor: the format's name of its type, such as "BF16", and its shape.

    `offset` is the place of its first byte in the file it was read from.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes; KeyError for a type that is not readable."""
        return self.numpy_dtype.itemsize * math.prod(self.shape)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type in NumPy; KeyError for one that is not readable."""
        return DTYPES[self.dtype] if self.dtype in DTYPES else _NUMBERS[self.dtype]

    @property
    def readable(self) -> bool:
        """Whether it is of one of `DTYPES`, or a single number of any integer or float type."""
        return self.dtype in DTYPES or self.shape == () and self.dtype in _NUMBERS


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns type and shape of every tensor of a file, in the order of the file's bytes; reads no tensor.

    Raises InputError that names the file and what is wrong with it. A pickle is refused unopened where its
    name tells, otherwise by its first bytes, and is never run.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise InputError(f"{path} is a pickle, which can run code: only safetensors files are read")
    try:
        text = _header_bytes(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    header = parse_json(text, f"the header of {path}")
    header.pop("__metadata__", None)
    bad = [name for name in header if ".." in name or name[:1] in ("", "/", "\\") or not name.isprintable()]
    if bad:
        raise InputError(f"{path} has unsafe names of tensors: {', '.join(map(ascii, bad[:10]))}")
    try:
        with safe_open(
            path, framework="np"
        ) as file:  # the library's checks, of offsets and lengths above all
            order = file.offset_keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a sound safetensors file (truncated?): {error}") from error
    start = 8 + len(text)
    return {
        name: TensorInfo(one["dtype"], tuple(one["shape"]), start + one["data_offsets"][0])
        for name, one in ((name, header[name]) for name in order)
    }


def _header_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > size - 8:
            if start.startswith(_PICKLE_STARTS):
                raise InputError(f"{path} is a pickle by another name: only safetensors files are read")
            if start == b"version ":
                raise InputError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
            raise InputError(f"{path} is not a safetensors file, or is truncated ({size} bytes)")
        if length > _MAX_HEADER_BYTES:
            raise InputError(f"{path} has a header of {length} bytes, more than {_MAX_HEADER_BYTES}")
        return file.read(length)


def read_tensors(
    path: Path, infos: Mapping[str, TensorInfo], *, mapped: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors of a file one after the other, by what `read_header` said of them; readable ones only.

    With `mapped` they are read-only views of the file, which the system reads when they are used: they take no
    memory of their own, and the file must not be overwritten in place while they live. Otherwise they are read.
    """
    view = np.memmap(path, np.uint8, mode="r") if mapped and infos else None
    with open(path, "rb") as file:
        for name, info in infos.items():
            # Files of early versions of the library are not aligned.
            if view is not None and info.offset % info.numpy_dtype.itemsize == 0:
                data = view[info.offset : info.offset + info.nbytes].view(np.ndarray)
            else:
                data = np.fromfile(file, np.uint8, info.nbytes, offset=info.offset - file.tell())
            yield name, data.view(info.numpy_dtype).reshape(info.shape)


def write_file(path: Path, infos: Mapping[str, TensorInfo], tensor: Callable[[str], np.ndarray]) -> None:
    """Writes a file tensor by tensor, so that only one of them needs to be in memory.

    `infos` tells what `tensor(name)` will return. The bytes are those that the safetensors library writes
    with the metadata {"format": "pt"}, which transformers asks for.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    types = list(DTYPES)
    order = sorted(infos, key=lambda name: (types.index(infos[name].dtype), name))
    offset = 0
    for name in order:
        info = infos[name]
        ends = [offset, offset + info.nbytes]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = np.asarray(tensor(name), order="C")
            if (array.dtype, array.shape) != (DTYPES[infos[name].dtype], infos[name].shape):
                raise ValueError(f"{name} is {array.dtype}{array.shape}, announced as {infos[name]}")
            file.write(array.reshape(-1).view(np.uint8).data)
