"""From a run's configuration to its networks, its objective and the shapes of its arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import make_schedule
from sbv2_jax.distill import optimizers
from sbv2_jax.distill.state import Frozen, TrainState, init_state
from sbv2_jax.distill.steps import Models, Objective
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.models.attention import Core
from sbv2_jax.models.clip_image import preprocess
from sbv2_jax.models.conditions import Text, TextEncoder, misfits
from sbv2_jax.models.network import Network
from sbv2_jax.models.registry import build, network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.unet import Execution
from sbv2_jax.run.components import Parts, latent_side
from sbv2_jax.tree import Params, Shapes

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything static of a run, and the shapes of everything else."""

    parts: Parts
    models: Models
    objective: Objective
    student_optimizer: optax.GradientTransformation
    score_optimizer: optax.GradientTransformation
    state_shapes: TrainState
    frozen_shapes: Frozen
    seed: int

    @property
    def lora_student(self) -> bool:
        """Whether a LoRA of the student is trained, not all of its weights."""
        return bool(self.frozen_shapes.student)


def assemble(config: ConfigDict, parts: Parts, core: Core | None = None) -> Run:
    """Builds the networks, the objective and the optimizers of a run; traces shapes, allocates nothing.

    `core` computes the attention of the UNets in training; without one, XLA does.
    Raises InputError where the components do not fit each other.
    """
    execution = Execution(remat=config.remat == "block", core=core)
    lora_student = config.student.mode == "lora"
    score = Network(
        lambda rngs: lora.attach(
            build(parts.teacher.config, rngs, execution=execution),
            config.score.targets,
            config.score.rank,
            rngs,
        )
    )
    student = network(parts.student.config, execution=execution)
    if lora_student:
        student = Network(
            lambda rngs: lora.attach(
                build(parts.student.config, rngs, execution=execution),
                config.student.lora.targets,
                config.student.lora.rank,
                rngs,
            )
        )
    text_encoder = TextEncoder(
        {name: network(part.config) for name, part in parts.text_encoders.items()},
        downsampling=parts.vae.config.downsampling,
        zero_null=parts.zero_null,
    )
    models = Models(
        student=student,
        student_schedule=make_schedule(parts.student_schedule),
        score=score,
        score_schedule=make_schedule(parts.teacher_schedule),
        text_encoder=text_encoder,
        **_clip_functions(parts),
    )
    _require_fit(config, parts)
    objective = _objective(config, parts)
    student_optimizer = _optimizer(config, config.student.lr, 1)
    score_optimizer = _optimizer(config, config.score.lr, config.score.updates_per_step)

    dtype = objective.compute_dtype
    teacher_shapes, score_shapes = lora.split(score.shapes)
    base_shapes, lora_shapes = lora.split(student.shapes)
    trained = lora_shapes if lora_student else base_shapes
    state_shapes = jax.eval_shape(
        lambda student, score: init_state(
            config.seed, student, score, student_optimizer, score_optimizer, config.ema > 0
        ),
        trained,
        score_shapes,
    )
    text_shapes = _as(text_encoder.shapes, dtype)
    frozen_shapes = Frozen(
        teacher=_as(teacher_shapes, dtype),
        student=_as(base_shapes, dtype) if lora_student else {},
        text_encoder=text_shapes,
        null_text=_null_text(parts, text_encoder, text_shapes, objective.latent_shape),
        decoder=_as(network(parts.decoder.config).shapes, dtype) if parts.decoder else {},
        clip=_as(network(parts.clip.config).shapes, dtype) if parts.clip else {},
    )
    return Run(
        parts=parts,
        models=models,
        objective=objective,
        student_optimizer=student_optimizer,
        score_optimizer=score_optimizer,
        state_shapes=state_shapes,
        frozen_shapes=frozen_shapes,
        seed=config.seed,
    )


def _as(shapes: Shapes, dtype: Any) -> Shapes:
    return {name: jax.ShapeDtypeStruct(shape.shape, dtype) for name, shape in shapes.items()}


def _null_text(
    parts: Parts, text_encoder: TextEncoder, shapes: Shapes, latent_shape: tuple[int, ...]
) -> Text:
    length = parts.prompt_length
    ids = (length,) if len(parts.text_encoders) == 1 else (len(parts.text_encoders), length)
    return jax.eval_shape(
        lambda params, ids: text_encoder.null(params, ids, latent_shape),
        shapes,
        jax.ShapeDtypeStruct(ids, jnp.int32),
    )


def _clip_functions(parts: Parts) -> dict[str, Any]:
    if parts.clip is None:
        return {}
    clip, decoder = network(parts.clip.config), network(parts.decoder.config)
    image = parts.clip_image
    # A tiny autoencoder works on scaled latents; the full one's scale is undone first.
    scale = 1.0 if isinstance(parts.decoder.config, TinyVAEConfig) else parts.decoder.config.scaling_factor

    def decode(params: Params, latents: jax.Array) -> jax.Array:
        return decoder.apply(params, latents / scale, method="decode")

    def clip_image(params: Params, pictures: jax.Array) -> jax.Array:
        pixels = preprocess(pictures, image.size, image.image_mean, image.image_std)
        return clip.apply(params, pixels, method="image_features")

    def clip_text(params: Params, input_ids: jax.Array) -> jax.Array:
        return clip.apply(params, input_ids, method="text_features")

    return {"decode": decode, "clip_image": clip_image, "clip_text": clip_text}


def _require_fit(config: ConfigDict, parts: Parts) -> None:
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
    if config.vsd.t_max >= parts.teacher_schedule.num_train_timesteps:
        raise InputError(f"config.vsd.t_max = {config.vsd.t_max} is beyond the teacher's last timestep")
    if parts.decoder and parts.decoder.config.latent_channels != unet.out_channels:
        raise InputError(
            f"{parts.decoder.directory} (config.clip.decoder) decodes {parts.decoder.config.latent_channels} "
            f"latent channels; the teacher has {unet.out_channels}"
        )
    side = latent_side(config, parts)
    factor = 2 ** (len(unet.block_out_channels) - 1)
    if side % factor:
        raise InputError(f"config.resolution: latents of {side} x {side} are not a multiple of {factor}")


def _objective(config: ConfigDict, parts: Parts) -> Objective:
    side = latent_side(config, parts)
    return Objective(
        steps=config.steps,
        latent_shape=(side, side, parts.teacher.config.in_channels),
        compute_dtype=DTYPES[config.precision],
        accumulate=config.accumulate,
        vsd_weight=config.vsd.weight,
        guidance=config.vsd.guidance,
        score_guidance=config.vsd.score_guidance,
        weighting=config.vsd.weighting,
        t_min=config.vsd.t_min,
        t_max=config.vsd.t_max,
        clip_weight=config.clip.weight,
        clip_tau=config.clip.tau,
        student_lora_scale=config.student.lora.alpha / config.student.lora.rank,
        score_lora_scale=config.score.alpha / config.score.rank,
        clip_passes=config.clip.passes,
        score_updates=config.score.updates_per_step,
        null_prompt_probability=config.score.null_prompt_probability,
        ema=config.ema,
    )


def _optimizer(config: ConfigDict, peak: float, updates_per_step: int) -> optax.GradientTransformation:
    values = config.optimizer
    # An optimizer counts its own updates, the configuration the run's steps.
    warmup, updates = values.warmup * updates_per_step, config.steps * updates_per_step
    return optimizers.adamw(
        optimizers.learning_rate(peak, values.schedule, warmup, updates),
        b1=values.b1,
        b2=values.b2,
        mu_dtype=DTYPES[values.mu_dtype],
        eps=values.eps,
        weight_decay=values.weight_decay,
        clip_norm=values.clip_norm,
    )
