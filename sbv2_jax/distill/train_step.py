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
    FRESH,
    Batch,
    Conditions,
    Metrics,
    StudentNoise,
    encode,
    follower_gradient,
    fresh_inputs,
    fresh_samples,
    random_numbers,
    started,
    student_gradient,
)
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.player import Player
from sbv2_jax.distill.random_numbers import keys_of_updates
from sbv2_jax.distill.state import Frozen, PlayerState, TrainState
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params, lerp

TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def make_train_step(method: Method, place: Placement = ANYWHERE, programs: Programs = INLINE) -> TrainStep:
    """Returns `train_step(state, frozen, batch) -> (state, metrics)`; inline it is pure, to be jitted.

    The student is updated by the gradient of its terms, then each follower on the student's samples. What a follower
    has of further updates come before, each on prompts, noise and samples of its own, so that between two updates of
    the student all but one see the student as it is: as in DMD2 (Yin et al., 2024, section 4.2). Where a loss or a
    gradient is not finite, nothing but the step count changes and the metric `skipped` is 1.
    Every metric is a float32 scalar.
    """

    def begin(key: jax.Array, step: jax.Array, frozen: Frozen, batch: Batch) -> tuple[Any, ...]:
        noise, others = random_numbers(method, key, step, batch["input_ids"].shape[0])
        others = {player.name: player.read(batch, others[player.name]) for player in method.followers}
        counts = {player.name: player.updates - 1 for player in method.followers if player.updates > 1}
        keys = {name: keys_of_updates(key, step, count) for name, count in counts.items()}
        prompts = {name: batch[FRESH][:count] for name, count in counts.items()}
        return encode(method, frozen, batch), started(method, batch, noise), others, keys, prompts

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        conditions, student_noise, noise, keys, prompts = programs.run(
            "begin",
            begin,
            state.key,
            state.step,
            frozen,
            batch,
            out=(place.batch, place.batch, place.batch, place.whole, place.batches),
        )
        followers = dict(state.players)
        fresh: Metrics = {}
        own: Metrics = {}
        followers.pop(method.student.name)
        for player in method.followers:
            if player.name in keys:
                followers[player.name], found = _on_fresh_samples(
                    *(method, player, followers[player.name], state.student, frozen),
                    *(keys[player.name], prompts[player.name], programs, place),
                )
                fresh |= found
        current = dataclasses.replace(state, players={**state.players, **followers})

        def student_pass(
            conditions: Conditions, noise: StudentNoise
        ) -> tuple[tuple[Params, Metrics], jax.Array]:
            grads, x, metrics = student_gradient(method, current, frozen, conditions, noise, programs, place)
            return (grads, metrics), x

        (grads, metrics), x = programs.average(
            "student", student_pass, method.accumulate, (conditions, student_noise)
        )
        for player in method.followers:
            followers[player.name], found = _followed(
                *(player, followers[player.name], frozen, x, conditions.text, noise[player.name]),
                *(method.accumulate, programs, place),
            )
            own |= found
        return programs.run(
            "update",
            functools.partial(_finish, method),
            *(state, grads, followers, x, metrics, own, fresh),
            out=(place.state, place.whole),
            donate=(0,),
        )

    return train_step


def _on_fresh_samples(
    method: Method,
    player: Player,
    state: PlayerState,
    student: Params,
    frozen: Frozen,
    keys: jax.Array,
    prompts: jax.Array,
    programs: Programs,
    place: Placement,
) -> tuple[PlayerState, Metrics]:
    """Returns a follower after an update for each key and batch of prompts, and the metrics of each."""

    def update(state: PlayerState, given: tuple[jax.Array, jax.Array]) -> tuple[PlayerState, Metrics]:
        key, input_ids = given
        z, text, noise = programs.run(
            f"{player.name} fresh",
            functools.partial(fresh_inputs, method, player),
            *(key, frozen, input_ids),
            out=place.batch,
        )
        x = fresh_samples(method, student, frozen, z, text, programs, place)
        return _followed(player, state, frozen, x, text, noise, method.accumulate, programs, place)

    return programs.fold(f"{player.name} updates", update, state, (keys, prompts))


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
    """Returns a follower after an update on the samples x, and the metrics of it."""

    def one_pass(x: jax.Array, text: Text, noise: Any) -> tuple[tuple[Params, Metrics], tuple]:
        return follower_gradient(player, state.params, frozen, x, text, noise, programs, place), ()

    (grads, metrics), _ = programs.average(player.name, one_pass, accumulate, (x, text, noise))
    state, norm = programs.run(
        f"{player.name} update",
        functools.partial(_updated, player.optimizer),
        *(grads, state),
        out=(place.player(player.name), place.whole),
    )
    return state, metrics | {f"grad_norm/{player.name}": norm}


def _finish(
    method: Method,
    state: TrainState,
    grads: Params,
    followers: dict[str, PlayerState],
    x: jax.Array,
    metrics: Metrics,
    own: Metrics,
    fresh: Metrics,
) -> tuple[TrainState, Metrics]:
    """Updates the student and takes over the new followers, if every number of the step is finite.

    `own` holds the followers' metrics on the samples x, `fresh` those on fresh ones, of all updates each.
    """
    name = method.student.name
    student, norm = _updated(method.student.optimizer, grads, state.players[name])
    metrics = metrics | own | {key: jnp.mean(jnp.append(values, own[key])) for key, values in fresh.items()}
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
