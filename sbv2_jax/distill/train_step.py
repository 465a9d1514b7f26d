"""One step of training: the stages composed, both updates, and the guard against what is not finite."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sbv2_jax.devices.programs import ANYWHERE, INLINE, Placement, Programs
from sbv2_jax.distill.ema import ema_decay
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.distill.steps import (
    Batch,
    Conditions,
    Metrics,
    Models,
    Objective,
    ScoreNoise,
    StudentNoise,
    draw,
    encode,
    score_gradient,
    student_gradient,
)
from sbv2_jax.tree import Params, lerp

TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    models: Models,
    objective: Objective,
    student_optimizer: optax.GradientTransformation,
    score_optimizer: optax.GradientTransformation,
    place: Placement = ANYWHERE,
    programs: Programs = INLINE,
) -> TrainStep:
    """Returns `train_step(state, frozen, batch) -> (state, metrics)`; inline it is pure, to be jitted.

    Where a loss or a gradient is not finite, nothing but the step count changes and the metric `skipped` is 1.
    Every metric is a float32 scalar.
    """
    gradients = {"programs": programs, "place": place}

    def begin(key: jax.Array, step: jax.Array, frozen: Frozen, batch: Batch):
        count = batch.input_ids.shape[0]
        noise = draw(objective, key, step, count, models.score_schedule.num_timesteps)
        return encode(models, objective, frozen, batch), *noise

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        conditions, student_noise, score_noise = programs.run(
            "begin",
            begin,
            state.key,
            state.step,
            frozen,
            batch,
            out=(place.batch, place.batch, place.batches),
        )

        def student_pass(conditions: Conditions, noise: StudentNoise):
            grads, x, metrics = student_gradient(
                models, objective, state, frozen, conditions, noise, **gradients
            )
            return (grads, metrics), x

        (grads, metrics), x = programs.average(
            "student", student_pass, objective.accumulate, (conditions, student_noise)
        )

        def score_update(carry: tuple[Params, Any], noise: ScoreNoise):
            score, score_opt = carry

            def score_pass(x: jax.Array, text: Any, noise: ScoreNoise):
                return score_gradient(models, objective, score, frozen, x, text, noise, **gradients), ()

            (grads, metrics), _ = programs.average(
                "score", score_pass, objective.accumulate, (x, conditions.text, noise)
            )
            score, score_opt, norm = programs.run(
                "score update",
                functools.partial(_updated, score_optimizer),
                *(grads, score_opt, score),
                out=(place.score, place.score_opt, place.whole),
            )
            return (score, score_opt), metrics | {"grad_norm/score": norm}

        (score, score_opt), score_metrics = programs.fold(
            "score updates", score_update, (state.score, state.score_opt), score_noise
        )
        return programs.run(
            "update",
            functools.partial(_finish, objective, student_optimizer),
            *(state, grads, score, score_opt, x, metrics, score_metrics),
            out=(place.state, place.whole),
            donate=(0,),
        )

    return train_step


def _finish(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    score: Params,
    score_opt: optax.OptState,
    x: jax.Array,
    metrics: Metrics,
    score_metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """Updates the student and takes over the new score model, if every number of the step is finite."""
    student, student_opt, norm = _updated(optimizer, grads, state.student_opt, state.student)
    metrics = metrics | jax.tree.map(jnp.mean, score_metrics)
    metrics |= {"grad_norm/student": norm, "latents/std": jnp.std(x)}
    finite = jnp.all(jnp.array([jnp.isfinite(value) for value in metrics.values()]))
    new = TrainState(
        step=state.step,
        key=state.key,
        student=student,
        student_opt=student_opt,
        ema=lerp(state.ema, student, ema_decay(objective.ema, state.step)) if state.ema else {},
        score=score,
        score_opt=score_opt,
    )
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    return dataclasses.replace(new, step=state.step + 1), metrics


def _updated(
    optimizer: optax.GradientTransformation, grads: Params, opt_state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState, jax.Array]:
    """Returns the new parameters and optimizer state, and the norm of the gradient."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.global_norm(grads)
