"""Pictures from token ids and noise: a pure function of a generator and its parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.schedule import Schedule, is_guided
from sbv2_jax.models.conditions import Text, TextEncoder, like, steered
from sbv2_jax.models.network import Network
from sbv2_jax.tree import Params, cast

# How strongly attention is steered away from a negative prompt, where nothing else is said: ours.
NEGATIVE_SCALE = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """What is static about a text-to-image model: its networks, schedule and latent scale."""

    unet: Network
    schedule: Schedule
    text_encoder: TextEncoder
    vae: Network
    scaling_factor: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratorParams:
    """The parameters of a `Generator`; those of all text towers in one dictionary (`conditions.join_towers`)."""

    unet: Params
    text_encoder: Params
    vae: Params


def generate(
    generator: Generator,
    params: GeneratorParams,
    input_ids: jax.Array,
    null_ids: jax.Array,
    noise: jax.Array,
    again: jax.Array | None = None,
    **settings: Any,
) -> jax.Array:
    """Returns pictures, float32 [B, H, W, 3] in [0, 1], from token ids and noise [B, h, w, c].

    The arguments are those of `draw_latents`; as it, this is pure.
    """
    latents = draw_latents(generator, params, input_ids, null_ids, noise, again, **settings)
    return decode(generator, params.vae, latents)


def draw_latents(
    generator: Generator,
    params: GeneratorParams,
    input_ids: jax.Array,
    null_ids: jax.Array,
    noise: jax.Array,
    again: jax.Array | None = None,
    *,
    negative_ids: jax.Array | None = None,
    guidance: float | jax.Array = 1.0,
    negative_scale: float | jax.Array = NEGATIVE_SCALE,
    steps: int | None = None,
    sampler: str | None = None,
) -> jax.Array:
    """Returns scaled latents, float32 [B, h, w, c], from token ids and noise of that shape; no autoencoder is read.

    Token ids are [B, S], or [B, 2, S] for SDXL's two towers; the picture's size, which SDXL is told, is that of the
    noise. One step predicts x0 at the last timestep, as a distilled student does; more integrate with "ddim" or
    "dpm" (`samplers.sample`), or go on from x0 with "lcm" as a student of few steps does (`samplers.few_steps`), for
    which `again` is the noise of each further step, [B, steps - 1, h, w, c]. Without `steps` and `sampler` a student
    draws in its own, any other in one (`samplers.settled`). `null_ids` is the empty prompt, [S] or [2, S], read where
    `guidance` is over 1; 1 and less are none, as in diffusers.
    `negative_ids`, of the shape of `input_ids`, are what is not to be seen: with guidance they stand in the place of
    the empty prompt, as in diffusers; without, attention is steered away from them (`conditions.steered`), by
    `negative_scale`.
    Pure: the generator, `steps` and `sampler` are static under `jax.jit`; a guidance that is traced is one over 1.
    """
    latent_shape = noise.shape[1:]
    text = null = encode(generator, params, input_ids, latent_shape)
    if negative_ids is not None:
        negative = encode(generator, params, negative_ids, latent_shape)
        if is_guided(guidance):
            null = negative
        else:
            text = null = steered(text, negative, negative_scale)
    elif is_guided(guidance):
        empty = generator.text_encoder.null(params.text_encoder, null_ids, latent_shape)
        null = like(cast(empty, _dtype(params)), text)
    return denoised(
        generator, params, text, null, noise, again, guidance=guidance, steps=steps, sampler=sampler
    )


def encode(
    generator: Generator, params: GeneratorParams, input_ids: jax.Array, latent_shape: tuple[int, ...]
) -> Text:
    """Returns the conditions of prompts, of token ids as for `draw_latents`, in the UNet's dtype."""
    found = generator.text_encoder.apply(params.text_encoder, input_ids, latent_shape)
    return cast(found, _dtype(params))


def denoised(
    generator: Generator,
    params: GeneratorParams,
    text: Text,
    null: Text,
    noise: jax.Array,
    again: jax.Array | None = None,
    *,
    guidance: float | jax.Array = 1.0,
    steps: int | None = None,
    sampler: str | None = None,
) -> jax.Array:
    """Returns scaled latents as `draw_latents` does, of conditions in the place of token ids."""
    dtype = _dtype(params)

    def predict(x: jax.Array, t: jax.Array, text: Text) -> jax.Array:
        return generator.unet.apply(params.unet, x.astype(dtype), t, *text).astype(jnp.float32)

    denoise = samplers.guided(predict, text, null, guidance)
    schedule = generator.schedule
    steps, sampler = samplers.settled(schedule, steps, sampler)
    if sampler == "lcm" or steps == 1:
        last = (schedule.num_timesteps - 1,)
        timesteps = samplers.few_timesteps(schedule, steps) if sampler == "lcm" else last
        return samplers.few_steps(denoise, schedule, noise, again, timesteps, dtype)
    return samplers.sample(denoise, schedule, noise, steps=steps, sampler=sampler, dtype=dtype)


def _dtype(params: GeneratorParams) -> jnp.dtype:
    return params.unet["conv_in.kernel"].dtype


def decode(generator: Generator, vae: Params, latents: jax.Array) -> jax.Array:
    """Returns pictures, float32 [B, H, W, 3] in [0, 1], of scaled latents [B, h, w, c]."""
    latents = (latents / generator.scaling_factor).astype(vae["decoder.conv_in.kernel"].dtype)
    images = generator.vae.apply(vae, latents, method="decode").astype(jnp.float32)
    return jnp.clip(images * 0.5 + 0.5, 0.0, 1.0)


def to_uint8(images: jax.Array) -> np.ndarray:
    """Returns pictures in [0, 1] as uint8, rounded."""
    return np.asarray(jnp.round(images * 255.0)).astype(np.uint8)
