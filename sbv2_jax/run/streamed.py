"""Arrays of a state, brought whole to process 0 one at a time, when they are asked for: none is kept."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sbv2_jax.checkpoint.snapshot import snapshot
from sbv2_jax.tree import Params

_NOTHING_MORE = -1


class _Later:
    """An array that NumPy makes when it is asked to."""

    def __init__(self, number: int, leaf: Any):
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self._number, self._leaf = number, leaf

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        _next(self._number)
        return _whole(self._leaf).astype(dtype or self.dtype, copy=False)


def streamed(params: Params) -> dict[str, Any]:
    """Returns what stands for each array in process 0, while all others are `serving` the same arrays."""
    return {name: _Later(number, leaf) for number, (name, leaf) in enumerate(params.items())}


@contextlib.contextmanager
def serving(params: Params) -> Iterator[None]:
    """Has process 0 do what is within, which the others do not: they give their parts of what it asks for."""
    leaves = list(params.values())
    try:
        if jax.process_index() != 0:
            while (number := _next(_NOTHING_MORE)) != _NOTHING_MORE:
                _whole(leaves[number])
        yield
    finally:
        if jax.process_index() == 0:
            _next(_NOTHING_MORE)


def _next(number: int) -> int:
    """Returns the number that process 0 says, in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _whole(leaf: Any) -> np.ndarray:
    """Returns an array, gathered by all processes together; what it was made of on the host is held by nobody else."""
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(snapshot({"": leaf})[""])
