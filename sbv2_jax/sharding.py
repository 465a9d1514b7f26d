"""Sharding as data: ordered regular expressions over leaf names, applied to a ("data", "fsdp") mesh."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sbv2_jax.errors import InputError
from sbv2_jax.tree import leaf_names

AXES = ("data", "fsdp")

# Leaves below this many scalars gain nothing from being split, and cost a gather each.
SMALLEST_SPLIT = 2**14

# (pattern, strategy), first match wins. "fsdp" splits the largest dimension that the axis divides.
Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = (
    (r"(.*\.)?(step|key|count)", "replicate"),
    (r".*", "fsdp"),
)


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of data x fsdp devices, 1 x 1 on a laptop."""
    # Auto axes: explicit ones refuse a convolution with a sharded kernel.
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Returns a sharding for every leaf of a pytree of arrays or shapes.

    Raises InputError that lists every leaf that no rule matches, and every rule that matches no leaf of any
    tree is the caller's to find with `matches`.
    """
    leaves, structure = jax.tree.flatten(tree)
    strategies = _strategies(leaf_names(tree), rules)
    specs = [_spec(strategy, leaf.shape, mesh) for strategy, leaf in zip(strategies, leaves, strict=True)]
    return jax.tree.unflatten(structure, [NamedSharding(mesh, spec) for spec in specs])


def matches(tree: Any, rules: Rules = DEFAULT_RULES) -> dict[str, int]:
    """Returns how many leaves each rule's pattern is the first to match."""
    names = leaf_names(tree)
    _strategies(names, rules)
    counts = {pattern: 0 for pattern, _ in rules}
    for name in names:
        counts[next(pattern for pattern, _ in rules if re.fullmatch(pattern, name))] += 1
    return counts


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def constrain_batch(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function for use under `jax.jit` that shards the leading axis of every array of a pytree."""
    return lambda tree: jax.lax.with_sharding_constraint(tree, batch_sharding(mesh))


def bytes_per_device(tree: Any, tree_shardings: Any) -> int:
    """Returns the bytes that one device holds of a pytree of shapes under these shardings."""
    per_leaf = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        tree_shardings,
    )
    return sum(jax.tree.leaves(per_leaf))


def _strategies(names: list[str], rules: Rules) -> list[str]:
    found = [
        next((strategy for pattern, strategy in rules if re.fullmatch(pattern, name)), None) for name in names
    ]
    if unmatched := [name for name, strategy in zip(names, found, strict=True) if strategy is None]:
        raise InputError(f"no sharding rule matches {', '.join(unmatched)}")
    return found


def _spec(strategy: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if strategy == "replicate":
        return PartitionSpec()
    if strategy != "fsdp":
        raise InputError(f"unknown sharding strategy {strategy!r}: expected 'fsdp' or 'replicate'")
    size = mesh.shape["fsdp"]
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < SMALLEST_SPLIT or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(("fsdp" if axis == largest else None) for axis in range(largest + 1)))
