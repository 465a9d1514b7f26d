"""Two training steps over meshes of eight devices, for `test_sharded_step.py`: JSON in, one line of JSON out."""

import dataclasses
import json
import sys

import conftest  # noqa: F401  (its settings of JAX)
import jax
import numpy as np
import optax
import tiny_world
from jax.sharding import Mesh
from toy_world import changed

from sbv2_jax.devices import sharding
from sbv2_jax.devices.rules import DEFAULT_RULES
from sbv2_jax.distill.gradients import FRESH
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.state import TrainState
from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.tree import leaf_names

SMALLEST_SPLIT = 512  # the networks here are small
UNET = tiny_world.UNET | tiny_world.ONE_LEVEL | {"block_out_channels": [16]}


PAIRED = {
    "terms": ("vsd", "regression"),
    "pairs.path": "drawn at random",
    "pairs.share": 0.25,
    "pairs.weight": 2.0,
}


class Sharded:
    """One world, whose steps run over any mesh from the same initial state on the host."""

    def __init__(self, changes: dict):
        fields = {"batch_size": 16, "score.updates_per_step": 3} | (changes or PAIRED)
        self.world = tiny_world.make_world(fields, unet=UNET)
        # Adam with an eps of the gradients' size: with 1e-8 rounding would decide the sign of the smallest.
        self.optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-3))
        self.method = with_optimizer(self.world.run.method, self.optimizer)
        self.initial = jax.device_get(self.world.init(self.method))

    def run(self, mesh: Mesh, *, accumulate: int = 1, runs: int = 1) -> list[tuple]:
        """Returns, of each run, the state and the metrics after two steps, and the batch as it was placed."""
        world = self.world
        method = dataclasses.replace(self.method, accumulate=accumulate)
        layout = self.layout(mesh)
        columns = dict.fromkeys(world.batch, layout.placement.batch)
        columns[FRESH] = layout.placement.batches
        placement = (layout.state, layout.frozen, columns)
        step = jax.jit(
            make_train_step(method, layout.placement),
            in_shardings=placement,
            out_shardings=(placement[0], None),
            donate_argnums=0,
        )
        results = []
        for _ in range(runs):
            arguments = zip((self.initial, world.frozen, world.batch), placement, strict=True)
            state, frozen, batch = (jax.device_put(*pair) for pair in arguments)
            for _ in range(2):
                state, metrics = step(state, frozen, batch)
            results.append((state, jax.device_get(metrics), batch))
        return results

    def layout(self, mesh: Mesh) -> sharding.Layout:
        return sharding.Layout(mesh, DEFAULT_RULES, self.initial, self.world.frozen)

    def moved(self, state: TrainState, mesh: Mesh) -> list[str]:
        """Returns the leaves of the state that are not where they were planned to be."""
        planned = jax.tree.leaves(self.layout(mesh).state)
        leaves = zip(leaf_names(state), jax.tree.leaves(state), planned, strict=True)
        return [name for name, leaf, plan in leaves if not leaf.sharding.is_equivalent_to(plan, leaf.ndim)]


def with_optimizer(method: Method, optimizer: optax.GradientTransformation) -> Method:
    """Returns the method with this optimizer for every player."""
    return changed(method, **{f"{name}__optimizer": optimizer for name in method.players})


def errors(state: TrainState, metrics: dict, want: TrainState, want_metrics: dict) -> dict[str, float]:
    """Returns the largest error of a part of the state, against the largest value of its tensor."""
    worst = {}
    leaves = (jax.tree.leaves(side) for side in (state, want))
    for name, a, b in zip(leaf_names(state), *leaves, strict=True):
        if "." in name:  # not the step and the key
            error = float(np.abs(np.float64(a) - b).max() / np.abs(b).max())
            part = name.partition(".")[0]
            worst[part] = max(error, worst.get(part, 0.0))
    assert worst.keys() == {"ema"} | {name + opt for name in state.players for opt in ("", "_opt")}
    names = want_metrics.keys() - {"skipped"}
    worst["metrics"] = max(abs(float(metrics[n]) / float(want_metrics[n]) - 1) for n in names)
    return worst


def held(state: TrainState) -> dict[str, float]:
    """Returns the share of the state that one device holds: of the leaves that can be split, and the others."""
    sizes = {"large": [0, 0], "small": [0, 0]}
    for leaf in jax.tree.leaves(state):
        large = leaf.size >= SMALLEST_SPLIT and any(length % 8 == 0 for length in leaf.shape)
        for i, size in enumerate((leaf.addressable_shards[0].data.size, leaf.size)):
            sizes["large" if large else "small"][i] += size
    return {kind: part / whole for kind, (part, whole) in sizes.items()}


def main(meshes: list[str], shapes: dict[str, list[int]], changes: dict) -> None:
    abstract = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    grids = {name: sharding.make_mesh(*map(int, name.split("x"))) for name in meshes}
    out = {name: {} for name in ("errors", "moved", "again", "specs", "batch", "held")}
    for name, mesh in grids.items():
        planned = sharding.shardings(abstract, mesh)
        out["specs"][name] = {leaf: list(plan.spec) for leaf, plan in planned.items()}

    sharding.SMALLEST_SPLIT = SMALLEST_SPLIT
    sharded = Sharded(changes)
    [(want, want_metrics, _)] = sharded.run(sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    for name, mesh in grids.items():
        results = sharded.run(mesh, accumulate=2 if name == "1x2x4" else 1, runs=2)
        state, metrics, batch = results[0]
        assert metrics["skipped"] == 0
        out["errors"][name] = errors(state, metrics, want, want_metrics)
        pairs = zip(*(jax.tree.leaves(result[0]) for result in results), strict=True)
        out["again"][name] = all(np.array_equal(a, b) for a, b in pairs)
        out["moved"][name] = sharded.moved(state, mesh)
        out["held"][name] = held(state)
        ids = batch["input_ids"]
        shard = ids.addressable_shards[0].data.shape[0]
        out["batch"][name] = {"spec": list(ids.sharding.spec), "shard": shard}
    print(json.dumps(out | {"batch_size": sharded.world.config.batch_size}))


if __name__ == "__main__":
    main(**json.load(sys.stdin))
