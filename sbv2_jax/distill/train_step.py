"""One step of training: the stages composed, every player's update, and the guard against what is not finite."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sbv2_jax.devices.programs import ANYWHERE, INLINE, Placement, Programs
from sbv2_jax.distill.ema import ema_decay
from sbv2_jax.distill.gradients import (
    Batch,
    Conditions,
    Metrics,
    StudentNoise,
    encode,
    follower_gradient,
    random_numbers,
    student_gradient,
)
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.player import Player
from sbv2_jax.distill.state import Frozen, PlayerState, TrainState
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params, lerp

TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def make_train_step(method: Method, place: Placement = ANYWHERE, programs: Programs = INLINE) -> TrainStep:
    """Returns `train_step(state, frozen, batch) -> (state, metrics)`; inline it is pure, to be jitted.

    The student is updated by the gradient of its terms, then each follower on the student's samples. Where a
    loss or a gradient is not finite, nothing but the step count changes and the metric `skipped` is 1.
    Every metric is a float32 scalar.
    """

    def begin(key: jax.Array, step: jax.Array, frozen: Frozen, batch: Batch):
        noise = random_numbers(method, key, step, batch["input_ids"].shape[0])
        return encode(method, frozen, batch), *noise

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        conditions, student_noise, noise = programs.run(
            "begin",
            begin,
            state.key,
            state.step,
            frozen,
            batch,
            out=(place.batch, place.batch, place.batches),
        )

        def student_pass(conditions: Conditions, noise: StudentNoise):
            grads, x, metrics = student_gradient(method, state, frozen, conditions, noise, programs, place)
            return (grads, metrics), x

        (grads, metrics), x = programs.average(
            "student", student_pass, method.accumulate, (conditions, student_noise)
        )
        followers, others = {}, {}
        for player in method.followers:
            followers[player.name], found = _followed(
                player,
                state.players[player.name],
                *(frozen, x, conditions.text, noise[player.name]),
                *(method.accumulate, programs, place),
            )
            others |= found
        return programs.run(
            "update",
            functools.partial(_finish, method),
            *(state, grads, followers, x, metrics, others),
            out=(place.state, place.whole),
            donate=(0,),
        )

    return train_step


def _followed(
    player: Player,
    state: PlayerState,
    frozen: Frozen,
    x: jax.Array,
    text: Text,
    noise: Any,
    accumulate: int,
    programs: Programs,
    place: Placement,
) -> tuple[PlayerState, Metrics]:
    """Returns a follower after all of its updates in one step, and the metrics of each update."""

    def update(state: PlayerState, noise: Any):
        def one_pass(x: jax.Array, text: Text, noise: Any):
            return follower_gradient(player, state.params, frozen, x, text, noise, programs, place), ()

        (grads, metrics), _ = programs.average(player.name, one_pass, accumulate, (x, text, noise))
        state, norm = programs.run(
            f"{player.name} update",
            functools.partial(_updated, player.optimizer),
            *(grads, state),
            out=(place.player(player.name), place.whole),
        )
        return state, metrics | {f"grad_norm/{player.name}": norm}

    return programs.fold(f"{player.name} updates", update, state, noise)


def _finish(
    method: Method,
    state: TrainState,
    grads: Params,
    followers: dict[str, PlayerState],
    x: jax.Array,
    metrics: Metrics,
    others: Metrics,
) -> tuple[TrainState, Metrics]:
    """Updates the student and takes over the new followers, if every number of the step is finite."""
    name = method.student.name
    student, norm = _updated(method.student.optimizer, grads, state.players[name])
    metrics = metrics | jax.tree.map(jnp.mean, others)
    metrics |= {f"grad_norm/{name}": norm, "latents/std": jnp.std(x)}
    finite = jnp.all(jnp.array([jnp.isfinite(value) for value in metrics.values()]))
    players = {name: student, **followers}
    new = dataclasses.replace(
        state,
        players={name: players[name] for name in state.players},
        ema=lerp(state.ema, student.params, ema_decay(method.ema, state.step)) if state.ema else {},
    )
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    return dataclasses.replace(new, step=state.step + 1), metrics


def _updated(
    optimizer: optax.GradientTransformation, grads: Params, state: PlayerState
) -> tuple[PlayerState, jax.Array]:
    """Returns the new parameters and optimizer state, and the norm of the gradient."""
    updates, opt = optimizer.update(grads, state.opt, state.params)
    return PlayerState(optax.apply_updates(state.params, updates), opt), optax.global_norm(grads)
