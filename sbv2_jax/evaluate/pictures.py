"""Sets of pictures that are read by number: a folder of files, or pictures that a function makes."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from sbv2_jax.convert.formats.files import existing_directory
from sbv2_jax.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_BLOCK = 2**20


class Pictures(Protocol):
    """Pictures by number; `fingerprint` stands for their content, and is the same in every process."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns a picture, uint8 [H, W, 3]; their sizes may differ."""
        ...


class Folder:
    """The pictures of a directory and of those in it, in the order of their paths.

    Raises InputError where there are none.
    """

    def __init__(self, directory: str | Path):
        self.directory = existing_directory(directory)
        self.paths = sorted(
            path for path in self.directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if not self.paths:
            raise InputError(f"{directory} holds no pictures ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a picture: {error}") from error

    @functools.cache  # noqa: B019 (a set of pictures lives as long as its evaluation)
    def fingerprint(self) -> str:
        """Returns one SHA-256 over the names and the contents of all files."""
        total = hashlib.sha256()
        for path in self.paths:
            total.update(f"{path.relative_to(self.directory)}\0".encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    total.update(block)
            total.update(b"\0")
        return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class Made:
    """`count` pictures that `make(index)` makes; `name` says everything that they depend on."""

    name: str
    count: int
    make: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.make(index)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()
