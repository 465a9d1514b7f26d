"""One training loop for every stage: a jitted step, checkpoints, metrics, pictures, exact resume."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers

from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.devices.sharding import batch_sharding, make_mesh
from sbv2_jax.distill.ema import ema_decay
from sbv2_jax.run.guard import Guard
from sbv2_jax.run.log import MetricsLog
from sbv2_jax.run.preemption import Preempted, Preemption
from sbv2_jax.tree import Arrays, Params, lerp

_LAST_OF_BRANCH = re.compile(r"(.*\.(conv2|conv\.4|proj_out|to_out\.0)|conv_out)\.kernel")
_HIDDEN_KERNEL = re.compile(r"(?!(.*\.)?(conv_in|conv_out|patch_embedding)\.).*\.kernel")

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, Metrics]]

# What a resumed stage may change: more steps are the usual wish.
_MAY_CHANGE = ("steps", "lr", "checkpoint_every", "cooldown", "guidance", "sample_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One network to train.

    `loss(params, inputs, key)` draws its own batch from `inputs` (a pytree of arrays, all of the data) and
    returns a scalar and metrics. `settings` holds the fields of `settings._training` and of the network.
    `preview(params)` is called with the averaged weights at every checkpoint. `fingerprint` names everything
    that the stage builds upon; a checkpoint of another one is refused.
    """

    name: str
    loss: Loss
    init: Callable[[], Mapping[str, np.ndarray]]
    inputs: Any
    settings: ConfigDict
    preview: Callable[[Arrays], None]
    fingerprint: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StageState:
    """Everything a step changes: `ema` averages `params`."""

    step: jax.Array
    params: Params
    opt: optax.OptState
    ema: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What all stages of a run share."""

    workdir: Path
    seed: int
    cooldown: float
    clip_norm: float
    log_every: int
    keep: int


def train(stage: Stage, shared: Shared) -> dict[str, np.ndarray]:
    """Trains a stage to its last step, from its newest checkpoint if there is one; returns the averaged weights.

    A stage that is complete is only read. Raises InputError where the checkpoints are of other settings and as
    `Guard` does, and Preempted after a step that a signal made the last.
    """
    settings, directory = stage.settings, shared.workdir / stage.name
    optimizer = make_optimizer(settings, shared.cooldown, shared.clip_norm)
    seed = int(digest(stage.name, str(shared.seed))[:8], 16)  # no two stages draw alike
    step = jax.jit(make_step(stage.loss, optimizer, settings.ema, seed), donate_argnums=0)
    config = {
        **settings.to_dict(),
        "seed": shared.seed,
        "cooldown": shared.cooldown,
        "clip_norm": shared.clip_norm,
    }
    checkpoints = Checkpoints(
        directory / "checkpoints",
        keep=shared.keep,
        config=config,
        fingerprint=stage.fingerprint,
        may_change=_MAY_CHANGE,
    )
    with Preemption() as preemption, checkpoints:
        state, start = _restored_or_new(stage, optimizer, checkpoints)
        if start < settings.steps:
            left = f"{settings.steps - start} of {settings.steps} steps to go"
            print(f"{stage.name}: {left}; the first compiles them, a minute or two", flush=True)
            state = _advance(stage, shared, step, state, start, checkpoints, preemption)
        else:
            stage.preview(state.ema)  # the process may have ended before its last one
    return {name: np.asarray(leaf) for name, leaf in state.ema.items()}


def _advance(
    stage: Stage,
    shared: Shared,
    step: Callable,
    state: StageState,
    start: int,
    checkpoints: Checkpoints,
    preemption: Preemption,
) -> StageState:
    settings, directory = stage.settings, shared.workdir / stage.name
    guard = Guard(directory)
    inputs = jax.device_put(stage.inputs, everywhere())
    pending: list[Metrics] = []
    with MetricsLog(
        directory, steps=settings.steps, batch_size=settings.batch_size, resume_step=start
    ) as log:
        for number in range(start + 1, settings.steps + 1):
            state, metrics = step(state, inputs)
            pending.append(metrics)
            preempted = preemption.requested()
            last = preempted or number == settings.steps
            if last or number % shared.log_every == 0:
                found = jax.device_get(pending)
                log.write(number, _mean(found))
                for of, metrics in enumerate(found, start=number - len(found) + 1):
                    guard.check(of, metrics)
                pending.clear()
            if last or number % settings.checkpoint_every == 0:
                checkpoints.save(number, state)
            if preempted:
                checkpoints.wait()  # or its error
                raise Preempted(number, stage.name)
            if last or number % settings.checkpoint_every == 0:
                stage.preview(state.ema)
    if preemption.requested():  # while the last preview was made
        checkpoints.wait()
        raise Preempted(settings.steps, stage.name)
    return state


def _mean(metrics: list[Metrics]) -> dict[str, float]:
    """Returns the mean over the steps that were not skipped, if any, and the share of those that were."""
    kept = [one for one in metrics if not one["skipped"]] or metrics
    means = {name: float(np.mean([one[name] for one in kept])) for name in metrics[0]}
    return means | {"skipped": float(np.mean([one["skipped"] for one in metrics]))}


def _restored_or_new(
    stage: Stage, optimizer: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[StageState, int]:
    def new(params: Params) -> StageState:
        return StageState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params),  # a donated state may not hold one buffer twice
        )

    params = {name: jnp.asarray(leaf) for name, leaf in stage.init().items()}
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere()),
        jax.eval_shape(new, params),
    )
    restored = checkpoints.restore(abstract)
    if restored is None:
        return jax.device_put(new(params), everywhere()), 0
    return restored[1], restored[0]


def everywhere() -> jax.sharding.NamedSharding:
    """Returns the sharding of what every device holds whole: parameters and data."""
    return jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec())


def draw_rows(key: jax.Array, count: int, array: jax.Array) -> jax.Array:
    """Returns `count` indices of an array's rows, drawn with replacement, int32 [count]; split over the devices."""
    return split_rows(jax.random.randint(key, (count,), 0, array.shape[0]))


def split_rows(rows: jax.Array) -> jax.Array:
    """Returns the rows of a batch, split over the devices; all that is computed from them is split alike."""
    return jax.lax.with_sharding_constraint(rows, batch_sharding(_mesh()))


def _mesh() -> jax.sharding.Mesh:
    return make_mesh(1, len(jax.devices()), 1)


def learning_rate(settings: ConfigDict, cooldown: float) -> optax.Schedule:
    """Returns the rate by step: a linear rise, a constant, and a linear fall to 0 over the last `cooldown` share.

    A constant middle lets a run be prolonged at any time (Zhai et al., 2022, section 3.5).
    """
    fall = max(1.0, cooldown * settings.steps)

    def rate(count: jax.Array) -> jax.Array:
        rising = (count + 1) / settings.warmup
        falling = (settings.steps - count) / fall
        return settings.lr * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

    return rate


def make_optimizer(settings: ConfigDict, cooldown: float, clip_norm: float) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al., 2024) for the kernels, convolutions as matrices [h * w * in, out].

    An update of a kernel has AdamW's usual size (Liu et al., 2025, equation 4). Adam with Nesterov's momentum
    takes the rest, and the layers that touch pixels or latents directly.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.contrib.muon(
            learning_rate(settings, cooldown),
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
            weight_decay=settings.weight_decay,
            adam_b2=0.99,
        ),
    )


def _matrices(params: Params) -> dict[str, Any]:
    """Returns which axes of a kernel make up a matrix, and None for what is none.

    optax calls this also with leaves already taken out, which stay as they are.
    """
    whole = MuonDimensionNumbers()
    of_rank = {2: whole, 4: MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)}
    return {
        name: of_rank.get(leaf.ndim) if _HIDDEN_KERNEL.fullmatch(name) else None
        for name, leaf in params.items()
        if hasattr(leaf, "ndim")
    } | {name: leaf for name, leaf in params.items() if not hasattr(leaf, "ndim")}


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema: float, seed: int
) -> Callable[[StageState, Any], tuple[StageState, Metrics]]:
    """Returns the pure function of one update; its key depends on the seed and the step alone.

    Where a loss or the gradient is not finite, nothing but the step count changes and the metric `skipped` is 1.
    """

    def step(state: StageState, inputs: Any) -> tuple[StageState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, inputs, key)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"grad_norm": optax.global_norm(grads)}
        finite = jnp.all(jnp.array([jnp.isfinite(value) for value in metrics.values()]))
        new = StageState(
            step=state.step, params=params, opt=opt, ema=lerp(state.ema, params, ema_decay(ema, state.step))
        )
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        return dataclasses.replace(new, step=state.step + 1), metrics

    return step


def quiet_branches(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns fresh parameters with zeros for the last layer of every residual branch and for the output.

    Training then starts from nearly linear networks and is ahead from the first hundred steps on; so do
    Nichol and Dhariwal (2021), in their code.
    """
    return {
        name: np.zeros_like(leaf) if _LAST_OF_BRANCH.fullmatch(name) else leaf
        for name, leaf in params.items()
    }


def digest(*values: str | Arrays) -> str:
    """Returns one SHA-256 over texts and parameters, to name what a stage builds upon."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            total.update(value.encode())
        else:
            for name in sorted(value):
                total.update(name.encode())
                total.update(np.ascontiguousarray(value[name]).tobytes())
        total.update(b"\0")
    return total.hexdigest()
