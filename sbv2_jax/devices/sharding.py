"""Sharding as data: ordered regular expressions over leaf names, applied to a mesh of devices.

The mesh has three axes. A batch is split over all of them. `fsdp` splits the weights too; `data` repeats them;
`replica` repeats them over slices that only a slow network joins.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sbv2_jax.devices.programs import Placement
from sbv2_jax.devices.rules import DEFAULT_RULES
from sbv2_jax.errors import InputError
from sbv2_jax.tree import leaf_names

AXES = ("replica", "data", "fsdp")

# Leaves below this many scalars gain nothing from being split, and cost a gather each.
SMALLEST_SPLIT = 2**14

# (pattern, strategy), first match wins. A strategy is "replicate", or the axes, joined by "+", over which the
# largest dimension that they divide is split.
Rules = Sequence[tuple[str, str]]

# Of devices, or of numbers of them alone.
AnyMesh = TypeVar("AnyMesh", bound=Mesh | AbstractMesh, covariant=True)


def make_mesh(replica: int, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of replica x data x fsdp devices, 1 x 1 x 1 on a laptop.

    On a TPU the devices of an fsdp group are neighbours, and each of several slices is one replica. GPUs come in
    the order of their ids, machine after machine.
    Raises InputError where the devices cannot be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    # GPUs have such an index too, that of their machine; the devices of a topology of one slice have none.
    slices = {getattr(device, "slice_index", None) for device in devices if device.platform == "tpu"}
    if len(slices) > 1 and replica != len(slices):
        raise InputError(
            f"config.mesh.replica = {replica} does not fit the {len(slices)} slices that are here, each of which is "
            "one replica"
        )
    # Else an axis would have to be whole axes of the torus: 4 fits neither 8 x 8 nor 8 x 8 x 8.
    split = {"allow_split_physical_axes": True}
    try:
        if len(slices) > 1:
            grid = mesh_utils.create_hybrid_device_mesh((1, data, fsdp), (replica, 1, 1), devices, **split)
        else:
            grid = mesh_utils.create_device_mesh((replica, data, fsdp), devices, **split)
    except (ValueError, NotImplementedError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"config.mesh: {replica} x {data} x {fsdp} devices cannot be laid out: {reason}"
        ) from error
    # Auto axes: explicit ones refuse a convolution with a sharded kernel.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Layout(Generic[AnyMesh]):
    """Where everything of a run lies; `state` and `frozen` are pytrees of what is placed, for their shapes.

    Raises InputError that lists every leaf without a rule, and every rule without a leaf.
    """

    mesh: AnyMesh
    rules: Rules
    state_shapes: Any
    frozen_shapes: Any

    def __post_init__(self):
        if idle := [pattern for pattern, leaves in self.matches().items() if not leaves]:
            raise InputError(f"config.mesh.rules: no leaf of the run is the first to match {', '.join(idle)}")

    @functools.cached_property
    def _shardings(self) -> dict[str, Any]:
        return shardings(self._named, self.mesh, self.rules)

    @property
    def _named(self) -> dict[str, Any]:
        return {"state": self.state_shapes, "frozen": self.frozen_shapes}

    @property
    def state(self) -> Any:
        """A sharding for each leaf of the state."""
        return self._shardings["state"]

    @property
    def frozen(self) -> Any:
        """A sharding for each leaf of the frozen networks."""
        return self._shardings["frozen"]

    @property
    def placement(self) -> Placement:
        """What a training step is told."""
        return Placement(
            batch=batch_sharding(self.mesh),
            batches=batches_sharding(self.mesh),
            whole=NamedSharding(self.mesh, PartitionSpec()),
            state=self.state,
        )

    @functools.cached_property
    def abstract(self) -> tuple[Any, Any]:
        """The shapes of state and frozen networks, with their shardings; always the same objects."""
        shapes, placed = self._named, self._shardings
        with_shardings = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            placed,
        )
        return with_shardings["state"], with_shardings["frozen"]

    def matches(self) -> dict[str, int]:
        """Returns of how many leaves each rule's pattern is the first to match."""
        return matches(self._named, self.rules)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Returns a sharding for every leaf of a pytree of arrays or shapes.

    Raises InputError that lists every leaf that no rule matches.
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


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def batches_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of several batches, stacked: the axis after the leading one over all devices."""
    return NamedSharding(mesh, PartitionSpec(None, AXES))


def bytes_per_device(tree: Any, tree_shardings: Any) -> int:
    """Returns the bytes that one device holds of a pytree of shapes under these shardings."""
    per_leaf = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        tree_shardings,
    )
    return sum(jax.tree.leaves(per_leaf))


def _strategies(names: list[str], rules: Rules) -> list[str]:
    found: list[str] = []
    unmatched: list[str] = []
    for name in names:
        strategy = next((strategy for pattern, strategy in rules if re.fullmatch(pattern, name)), None)
        if strategy is None:
            unmatched.append(name)
        else:
            found.append(strategy)
    if unmatched:
        raise InputError(f"no sharding rule matches {', '.join(unmatched)}")
    return found


def _spec(strategy: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    if strategy == "replicate":
        return PartitionSpec()
    axes = tuple(strategy.split("+"))
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise InputError(
            f"unknown sharding strategy {strategy!r}: {', '.join(map(repr, unknown))} is neither 'replicate' nor an "
            f"axis of the mesh ({', '.join(AXES)})"
        )
    size = math.prod(mesh.shape[axis] for axis in axes)
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < SMALLEST_SPLIT or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    over = axes[0] if len(axes) == 1 else axes
    return PartitionSpec(*((over if axis == largest else None) for axis in range(largest + 1)))
