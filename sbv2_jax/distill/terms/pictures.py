"""Pictures of latents, for the terms that look at pictures."""

from collections.abc import Callable

import jax

from sbv2_jax.distill.player import Setting
from sbv2_jax.errors import InputError
from sbv2_jax.models.config import AutoencoderConfig, of_kind
from sbv2_jax.models.registry import network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.tree import Params

Decode = Callable[[Params, jax.Array], jax.Array]


def decoder(setting: Setting, name: str, field: str) -> Decode:
    """Returns `decode(params, latents)`: pictures [B, H, W, 3] in about [-1, 1] of latents in the compute dtype.

    `name` is that of the frozen decoder, a tiny or a full one, and `field` the configuration's for messages.
    Raises InputError for a decoder of other latents than the teacher's.
    """
    part = setting.parts[name]
    channels = of_kind(setting.parts["teacher"].config, UNetConfig, "the teacher").out_channels
    config = of_kind(part.config, AutoencoderConfig, f"{part.directory} ({field})")
    if config.latent_channels != channels:
        raise InputError(
            f"{part.directory} ({field}) decodes {config.latent_channels} latent channels; the teacher has "
            f"{channels}"
        )
    vae = network(config)
    # A tiny autoencoder works on scaled latents; the full one's scale is undone first.
    scale = 1.0 if isinstance(config, TinyVAEConfig) else config.scaling_factor

    def decode(params: Params, latents: jax.Array) -> jax.Array:
        return vae.apply(params, latents.astype(setting.compute_dtype) / scale, method="decode")

    return decode
