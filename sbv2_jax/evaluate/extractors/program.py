"""A network over batches of one size on all devices: compiled once, whatever number of examples comes at a time."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sbv2_jax.devices.sharding import batch_sharding, make_mesh
from sbv2_jax.tree import cast

# What a network takes at a time, on each device.
PER_DEVICE = 32

Arrays = tuple[np.ndarray, ...]


class Program:
    """A pure function of parameters and a batch, its batch split over all devices, its parameters on each of them.

    `function(params, *arrays)` returns a dictionary of arrays, a row for every example. Everything is computed in
    float32: a TPU's or GPU's faster products are off by more than the figures differ. Of several processes each
    passes the same examples and gets all rows.
    """

    def __init__(
        self,
        function: Callable[..., dict[str, jax.Array]],
        params: Mapping[str, np.ndarray],
        *,
        per_device: int = PER_DEVICE,
        mesh: Mesh | None = None,
    ):
        mesh = make_mesh(1, jax.device_count(), 1) if mesh is None else mesh
        self.size = per_device * mesh.size
        self._whole, self._batch = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
        self.params = {
            name: _placed(array, self._whole) for name, array in cast(dict(params), np.float32).items()
        }

        def compute(params: Any, *arrays: jax.Array) -> dict[str, jax.Array]:
            with jax.default_matmul_precision("highest"):
                return function(params, *arrays)

        self._compute = jax.jit(compute, out_shardings=self._whole)

    def __call__(self, arrays: Arrays) -> dict[str, jax.Array]:
        """Returns the rows of a whole batch, `size` examples, which may still be computed."""
        return self._compute(self.params, *(_placed(array, self._batch) for array in arrays))

    def empty(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Returns what no example at all gives, by the shapes of one: `arrays` are a batch's."""
        shapes = jax.eval_shape(self._compute, self.params, *arrays)
        return {name: np.zeros((0, *shape.shape[1:]), shape.dtype) for name, shape in shapes.items()}

    def stream(
        self, prepare: Callable[[Any], Arrays], examples: Iterable[Any]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the rows of examples in their order, at most `size` at a time.

        `prepare` makes the arrays of one example; it runs in threads, one batch ahead of the devices. The batches
        are the same however the examples come, and the last one is filled up: no figure depends on it.
        """
        examples = iter(examples)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            before: tuple[dict[str, jax.Array], int] | None = None
            while chunk := list(itertools.islice(examples, self.size)):
                rows = list(pool.map(prepare, chunk))
                rows += [rows[-1]] * (self.size - len(chunk))
                running = self(tuple(np.stack(column) for column in zip(*rows, strict=True)))
                if before is not None:
                    yield _fetched(*before)
                before = running, len(chunk)
            if before is not None:
                yield _fetched(*before)


def joined(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the rows of all parts together; there is at least one part."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fingerprint(params: Mapping[str, np.ndarray], *settings: object) -> str:
    """Returns a SHA-256 over the names, shapes, types and bytes of parameters, and the `repr` of settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(params):
        array = np.asarray(params[name], order="C")
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_pictures(pictures: np.ndarray) -> None:
    """Raises ValueError for what is not uint8 [N, H, W, 3]."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}, not uint8 [N, H, W, 3]")


def _placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _fetched(rows: dict[str, jax.Array], count: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(array)[:count] for name, array in rows.items()}
