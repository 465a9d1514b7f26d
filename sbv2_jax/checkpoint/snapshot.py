"""Arrays as they are now, copied to the host's memory: each process has its own part, and no value twice."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

# Leaves below this many scalars are not worth a part for each device.
SMALLEST_SPLIT = 2**14
HOST = "pinned_host"


def snapshot(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns copies of named arrays in the host's memory, which stay as they are whatever becomes of the arrays.

    Nothing is waited for: the copies begin when the arrays are there, and a step that donates them waits for its
    devices, not for the host. What devices repeat is split over them. Every process calls this for the same leaves.
    """
    arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    placed = [_on_host(leaf.sharding, leaf.shape) for leaf in arrays.values()]
    copies = dict(zip(arrays, jax.device_put(list(arrays.values()), placed), strict=True))
    return {name: copies[name] if name in copies else np.array(leaf) for name, leaf in leaves.items()}


@functools.cache
def _on_host(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Returns where the copy of an array lies: on the hosts of the same devices, of which no two hold the same part."""
    if not isinstance(sharding, NamedSharding) or math.prod(shape) < SMALLEST_SPLIT:
        return sharding.with_memory_kind(HOST)
    mesh = sharding.mesh
    spec = [_axes(entry) for entry in sharding.spec] + [()] * (len(shape) - len(sharding.spec))
    used = {axis for axes in spec for axis in axes}
    idle = tuple(axis for axis in mesh.axis_names if axis not in used)
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        # The axes behind those that split it already: each device cuts its part out of what it holds.
        wanted = (*spec[axis], *idle)
        if shape[axis] % math.prod(mesh.shape[name] for name in wanted) == 0:
            spec[axis] = wanted
            break
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=HOST)


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
