"""The stages of a training step of SwiftBrush v2: pure functions with only latents between them.

draw               step, key               -> all random numbers of the step
encode             prompts                 -> text conditions
generate           student, z              -> x, the student's one-step sample
difference         teacher and score, x    -> the VSD gradient at x
pull               x                       -> d loss / d x, in latent space: VSD and clamped CLIP
student_gradient   all of these            -> the gradient to the student's parameters
score_gradient     x                       -> the gradient to the score LoRA
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbv2_jax.devices.programs import ANYWHERE, INLINE, Placement, Programs
from sbv2_jax.diffusion.schedule import (
    Schedule,
    add_noise,
    classifier_free_guidance,
    is_guided,
    to_epsilon,
    to_x0,
)
from sbv2_jax.distill import losses
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.models.conditions import Text, TextEncoder, like
from sbv2_jax.models.network import Network
from sbv2_jax.tree import Params, cast

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Every number of the method that a step depends on; the comments of `config.py` explain them."""

    steps: int
    latent_shape: tuple[int, int, int]
    compute_dtype: jnp.dtype = jnp.float32
    accumulate: int = 1
    vsd_weight: float = 1.0
    guidance: float = 4.5
    score_guidance: float = 4.5
    weighting: str = "sbv2"
    t_min: int = 20
    t_max: int = 980
    clip_weight: float = 0.0
    clip_tau: float = 0.35
    clip_passes: int = 1
    student_lora_scale: float = 1.0
    score_lora_scale: float = 1.0
    score_updates: int = 1
    null_prompt_probability: float = 0.1
    ema: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The networks of a run and their schedules; `score` is the teacher's UNet with a LoRA, and serves both.

    `decode(params, latents)` returns pictures in [-1, 1], `clip_image(params, pictures)` and
    `clip_text(params, input_ids)` return features [B, D]; all three are None without the CLIP loss.
    """

    student: Network
    student_schedule: Schedule
    score: Network
    score_schedule: Schedule
    text_encoder: TextEncoder
    decode: Callable[[Params, jax.Array], jax.Array] | None = None
    clip_image: Callable[[Params, jax.Array], jax.Array] | None = None
    clip_text: Callable[[Params, jax.Array], jax.Array] | None = None


class Batch(NamedTuple):
    """Token ids for the text encoder, [B, S] or SDXL's [B, 2, S], and [B, S] for the CLIP of the loss, or None."""

    input_ids: jax.Array
    clip_input_ids: jax.Array | None


class Conditions(NamedTuple):
    """The prompts as the networks take them, and the loss's text features [B, E] or None."""

    text: Text
    clip_text: jax.Array | None


class StudentNoise(NamedTuple):
    """The random numbers of the student's update: z, noise [B, h, w, C] and t [B]."""

    z: jax.Array
    noise: jax.Array
    t: jax.Array


class ScoreNoise(NamedTuple):
    """The random numbers of one score update: noise [B, h, w, C], t [B], null [B] (the prompt is dropped)."""

    noise: jax.Array
    t: jax.Array
    null: jax.Array


def draw(
    objective: Objective, key: jax.Array, step: jax.Array, batch_size: int, timesteps: int
) -> tuple[StudentNoise, ScoreNoise]:
    """Draws the whole batch's random numbers at once, each from a key of its own name.

    They depend on the root key and the step alone: not on the mesh, nor on how the batch is accumulated.
    The score's arrays have a leading axis of `score_updates`.
    """
    root = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    names = ("z", "vsd_noise", "vsd_t", "score_noise", "score_t", "null_prompt")
    keys = dict(zip(names, jax.random.split(root, len(names)), strict=True))
    shape = (batch_size, *objective.latent_shape)
    updates = objective.score_updates
    student = StudentNoise(
        z=jax.random.normal(keys["z"], shape),
        noise=jax.random.normal(keys["vsd_noise"], shape),
        t=jax.random.randint(keys["vsd_t"], (batch_size,), objective.t_min, objective.t_max + 1),
    )
    score = ScoreNoise(
        noise=jax.random.normal(keys["score_noise"], (updates, *shape)),
        t=jax.random.randint(keys["score_t"], (updates, batch_size), 0, timesteps),
        null=jax.random.bernoulli(
            keys["null_prompt"], objective.null_prompt_probability, (updates, batch_size)
        ),
    )
    return student, score


def encode(models: Models, objective: Objective, frozen: Frozen, batch: Batch) -> Conditions:
    """Encodes the prompts, for the UNets and for the CLIP loss."""
    text = models.text_encoder.apply(frozen.text_encoder, batch.input_ids, objective.latent_shape)
    clip_text = None
    if models.clip_text is not None:
        clip_text = models.clip_text(frozen.clip, batch.clip_input_ids).astype(jnp.float32)
    return Conditions(text, clip_text)


def generate(
    models: Models, objective: Objective, student: Params, frozen: Frozen, z: jax.Array, text: Text
) -> jax.Array:
    """Returns x = G(z, y), float32 [B, h, w, C]: the x0 that the student predicts at the last timestep from z."""
    schedule = models.student_schedule
    t = jnp.full(z.shape[:1], schedule.num_timesteps - 1, jnp.int32)
    output = models.student.apply(
        {**frozen.student, **cast(student, objective.compute_dtype)},
        z.astype(objective.compute_dtype),
        t,
        *text,
        lora_scale=objective.student_lora_scale,
    )
    return to_x0(schedule, output.astype(jnp.float32), z, t)


def difference(
    models: Models,
    objective: Objective,
    score: Params,
    frozen: Frozen,
    x: jax.Array,
    noise: StudentNoise,
    text: Text,
) -> jax.Array:
    """Returns the VSD gradient at x, [B, h, w, C], from one forward of the UNet over all rows.

    Teacher and score, conditional and not, differ by the text and by a per-row LoRA scale (0 for the
    teacher), so one copy of the network in the program serves them all. A guidance of 1 or
    less is none and has no unconditional rows.
    """
    schedule, count = models.score_schedule, x.shape[0]
    x_t = add_noise(schedule, x, noise.noise, noise.t)
    null = like(frozen.null_text, text)
    passes = [
        (rows, scale)
        for guidance, scale in (
            (objective.guidance, 0.0),
            (objective.score_guidance, objective.score_lora_scale),
        )
        for rows in ((text, null) if is_guided(guidance) else (text,))
    ]
    output = models.score.apply(
        {**frozen.teacher, **cast(score, objective.compute_dtype)},
        jnp.concatenate([x_t.astype(objective.compute_dtype)] * len(passes)),
        jnp.concatenate([noise.t] * len(passes)),
        *jax.tree.map(lambda *rows: jnp.concatenate(rows), *(rows for rows, _ in passes)),
        lora_scale=jnp.repeat(jnp.array([scale for _, scale in passes]), count),
    )
    rows = iter(jnp.split(output.astype(jnp.float32), len(passes)))

    def guided(guidance: float) -> jax.Array:
        conditional = next(rows)
        if is_guided(guidance):
            conditional = classifier_free_guidance(conditional, next(rows), guidance)
        return to_epsilon(schedule, conditional, x_t, noise.t)

    teacher_epsilon, score_epsilon = guided(objective.guidance), guided(objective.score_guidance)
    return losses.vsd_gradient(schedule, objective.weighting, x, x_t, noise.t, teacher_epsilon, score_epsilon)


def pull(
    models: Models,
    objective: Objective,
    frozen: Frozen,
    x: jax.Array,
    gradient: jax.Array,
    clip_text: jax.Array | None,
    clip_weight: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Returns d loss / d x, [B, h, w, C], and the losses: all that the student's backward pass needs.

    The loss is the mean over the batch of the VSD surrogate and, weighted, of the clamped CLIP loss, whose
    gradient flows through CLIP, the resize and the decoder, `clip_passes` parts of the batch one after the
    other.
    """
    passes = objective.clip_passes if models.clip_image is not None else 1

    def loss(x: jax.Array, gradient: jax.Array, clip_text: jax.Array | None) -> tuple[jax.Array, Metrics]:
        vsd = jnp.mean(losses.vsd_loss(x, gradient))
        total, metrics = objective.vsd_weight * vsd, {"loss/vsd": vsd}
        if models.clip_image is not None:
            pictures = models.decode(frozen.decoder, x.astype(objective.compute_dtype))
            features = models.clip_image(frozen.clip, pictures).astype(jnp.float32)
            clip = jnp.mean(losses.clamped_clip_loss(features, clip_text, objective.clip_tau))
            total += clip_weight * clip
            cosine = losses.cosine(features, clip_text)
            # A sample under the clamp is left alone.
            metrics |= {"loss/clip": clip, "clip/cosine": jnp.mean(cosine)}
            metrics["clip/clamped"] = jnp.mean((cosine >= objective.clip_tau).astype(jnp.float32))
        return total, metrics

    def one_pass(*args: Any) -> tuple[Metrics, jax.Array]:
        dx, metrics = jax.grad(loss, has_aux=True)(*args)
        return metrics, dx / passes

    metrics, dx = INLINE.average("pull", one_pass, passes, (x, gradient, clip_text))
    return dx, metrics


def student_gradient(
    models: Models,
    objective: Objective,
    state: TrainState,
    frozen: Frozen,
    conditions: Conditions,
    noise: StudentNoise,
    programs: Programs = INLINE,
    place: Placement = ANYWHERE,
) -> tuple[Params, jax.Array, Metrics]:
    """Returns the gradient to the student's parameters, its samples x without gradient, and the losses."""

    def forward(student: Params, frozen: Frozen, z: jax.Array, text: Text):
        return jax.vjp(lambda student: generate(models, objective, student, frozen, z, text), student)

    def weighted_pull(frozen: Frozen, x: jax.Array, gradient: jax.Array, clip_text, step: jax.Array):
        clip_weight = objective.clip_weight * (1.0 - step / objective.steps)
        return pull(models, objective, frozen, x, gradient, clip_text, clip_weight)

    x, backward = programs.run(
        "student forward", forward, state.student, frozen, noise.z, conditions.text, out=(place.batch, None)
    )
    gradient = programs.run(
        "difference",
        functools.partial(difference, models, objective),
        *(state.score, frozen, x, noise, conditions.text),
        out=place.batch,
    )
    dx, metrics = programs.run(
        "pull",
        weighted_pull,
        *(frozen, x, gradient, conditions.clip_text, state.step),
        out=(place.batch, place.whole),
    )
    (grads,) = programs.run("student backward", _pulled_back, backward, dx, out=(place.student,))
    return grads, x, metrics


def score_gradient(
    models: Models,
    objective: Objective,
    score: Params,
    frozen: Frozen,
    x: jax.Array,
    text: Text,
    noise: ScoreNoise,
    programs: Programs = INLINE,
    place: Placement = ANYWHERE,
) -> tuple[Params, Metrics]:
    """Returns the gradient of the denoising loss on x to the score LoRA, and the loss."""
    schedule = models.score_schedule

    def loss(score: Params, frozen: Frozen, x: jax.Array, text: Text, noise: ScoreNoise) -> jax.Array:
        x_t = add_noise(schedule, x, noise.noise, noise.t)

        def dropped(null: jax.Array, own: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(noise.null, tuple(range(1, own.ndim))), null[None], own)

        output = models.score.apply(
            {**frozen.teacher, **cast(score, objective.compute_dtype)},
            x_t.astype(objective.compute_dtype),
            noise.t,
            *jax.tree.map(dropped, frozen.null_text, text),
            lora_scale=objective.score_lora_scale,
        )
        epsilon = to_epsilon(schedule, output.astype(jnp.float32), x_t, noise.t)
        return jnp.mean(losses.score_loss(schedule, epsilon, noise.noise, noise.t))

    def forward(score: Params, *others: Any):
        return jax.vjp(lambda score: loss(score, *others), score)

    value, backward = programs.run(
        "score forward", forward, score, frozen, x, text, noise, out=(place.whole, None)
    )
    (grads,) = programs.run("score backward", _of_a_scalar, backward, out=(place.score,))
    return grads, {"loss/score": value}


def _pulled_back(backward: Callable, dx: jax.Array) -> tuple[Params]:
    return backward(dx)


def _of_a_scalar(backward: Callable) -> tuple[Params]:
    return backward(jnp.ones((), jnp.float32))
