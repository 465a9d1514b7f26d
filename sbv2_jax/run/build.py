"""From a run's configuration to its method and the shapes of its arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import make_schedule
from sbv2_jax.distill import optimizers
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.player import Setting
from sbv2_jax.distill.state import Frozen, TrainState, init_state
from sbv2_jax.distill.student import Student
from sbv2_jax.distill.terms.term import term_classes
from sbv2_jax.errors import InputError
from sbv2_jax.models.attention import Core
from sbv2_jax.models.conditions import Text, TextEncoder, misfits
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.part import Part
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import Execution
from sbv2_jax.run.components import Parts, latent_side
from sbv2_jax.tree import Shapes

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything static of a run, and the shapes of everything else.

    `frozen_parts` are the frozen networks beside the text encoder, by the names that `Frozen` has for them;
    `guidance` and `score_guidance` are those of teacher and score model in pictures of them, of a range its mean.
    """

    parts: Parts
    method: Method
    frozen_parts: dict[str, Part[ModelConfig]]
    compute_dtype: jnp.dtype
    guidance: float
    score_guidance: float
    state_shapes: TrainState
    frozen_shapes: Frozen
    seed: int

    @property
    def lora_student(self) -> bool:
        """Whether a LoRA of the student is trained, not all of its weights."""
        return self.method.student.base is not None


def assemble(config: ConfigDict, parts: Parts, core: Core | None = None) -> Run:
    """Builds the method of a run; traces shapes, allocates nothing.

    `core` computes the attention of the UNets in training; without one, XLA does.
    Raises InputError where the components do not fit each other.
    """
    _require_fit(parts)
    side, dtype = latent_side(config, parts), DTYPES[config.precision]
    setting = Setting(
        parts={"teacher": parts.teacher, "student": parts.student, **parts.networks},
        schedules={
            "teacher": make_schedule(parts.teacher_schedule),
            "student": make_schedule(parts.student_schedule),
        },
        latent_shape=(side, side, parts.teacher.config.in_channels),
        compute_dtype=dtype,
        execution=Execution(remat=config.remat == "block", core=core),
        rate=functools.partial(_rate, config),
        optimizer=functools.partial(_optimizer, config),
    )
    classes = term_classes(config)
    kinds = dict.fromkeys(player for term in classes for player in term.players)
    followers = {player.name: player.build(config, setting) for player in kinds}
    setting = dataclasses.replace(setting, players=followers)
    terms = [term.build(config, setting) for term in classes]
    method = Method(
        student=Student.build(config, setting),
        followers=tuple(followers.values()),
        terms=tuple(term for term in terms if term is not None),
        text_encoder=text_encoder_of(parts),
        latent_shape=setting.latent_shape,
        accumulate=config.accumulate,
        ema=config.ema,
    )
    if not method.terms:
        raise InputError("config.terms: nothing trains the student")
    state_shapes = jax.eval_shape(
        lambda params: init_state(config.seed, params, method.optimizers, config.ema > 0),
        {name: player.trained_shapes for name, player in method.players.items()},
    )
    frozen_parts = dict(parts.networks)
    for player in method.players.values():
        frozen_parts |= player.frozen_parts
    text_shapes = _as(method.text_encoder.shapes, dtype)
    frozen_shapes: Frozen = {
        name: _as(network(part.config).shapes, dtype) for name, part in frozen_parts.items()
    }
    frozen_shapes["text_encoder"] = text_shapes
    frozen_shapes["null_text"] = _null_text(parts, method, text_shapes)
    return Run(
        parts=parts,
        method=method,
        frozen_parts=frozen_parts,
        compute_dtype=dtype,
        guidance=float(np.mean(config.vsd.guidance)),
        score_guidance=config.vsd.score_guidance,
        state_shapes=state_shapes,
        frozen_shapes=frozen_shapes,
        seed=config.seed,
    )


def text_encoder_of(parts: Parts) -> TextEncoder:
    """Returns the text towers of a run as one function."""
    return TextEncoder(
        {name: network(part.config) for name, part in parts.text_encoders.items()},
        downsampling=parts.vae.config.downsampling,
        zero_null=parts.zero_null,
    )


def _as(shapes: Shapes, dtype: Any) -> Shapes:
    return {name: jax.ShapeDtypeStruct(shape.shape, dtype) for name, shape in shapes.items()}


def _null_text(parts: Parts, method: Method, shapes: Shapes) -> Text:
    length = parts.prompt_length
    ids = (length,) if len(parts.text_encoders) == 1 else (len(parts.text_encoders), length)
    return jax.eval_shape(
        lambda params, ids: method.text_encoder.null(params, ids, method.latent_shape),
        shapes,
        jax.ShapeDtypeStruct(ids, jnp.int32),
    )


def _require_fit(parts: Parts) -> None:
    unet = parts.teacher.config
    towers = {name: part.config for name, part in parts.text_encoders.items()}
    for part in (parts.teacher, parts.student):
        if wrong := misfits(part.config, towers):
            raise InputError(f"{part.directory} does not fit the teacher's text encoders: {'; '.join(wrong)}")
    if (parts.student.config.in_channels, parts.student.config.out_channels) != (
        unet.in_channels,
        unet.out_channels,
    ):
        raise InputError(f"{parts.student.directory} has other latent channels than the teacher")
    if parts.student_schedule.num_train_timesteps != parts.teacher_schedule.num_train_timesteps:
        raise InputError(f"{parts.student.directory} has another number of timesteps than the teacher")


def _rate(config: ConfigDict, peak: float, updates_per_step: int) -> optax.Schedule:
    values = config.optimizer
    # An optimizer counts its own updates, the configuration the run's steps.
    warmup, updates = values.warmup * updates_per_step, config.steps * updates_per_step
    return optimizers.learning_rate(peak, values.schedule, warmup, updates)


def _optimizer(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    values = config.optimizer
    return optimizers.adamw(
        rate,
        b1=values.b1,
        b2=values.b2,
        mu_dtype=DTYPES[values.mu_dtype],
        eps=values.eps,
        weight_decay=values.weight_decay,
        clip_norm=values.clip_norm,
    )
