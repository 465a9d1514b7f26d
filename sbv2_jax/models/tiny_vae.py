"""The tiny autoencoder TAESD, both ways, with diffusers' module names."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.config import AutoencoderConfig
from sbv2_jax.models.layers import ACTIVATIONS, Conv, upsample_nearest
from sbv2_jax.models.module import Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyVAEConfig(AutoencoderConfig):
    """The fields of an `AutoencoderTiny`'s `config.json`; the defaults are TAESD's.

    Callers multiply latents by `scaling_factor` after `encode` and divide by it before `decode`; it is 1
    because TAESD was trained on latents that are already scaled.
    Raises ValueError where widths and block counts do not fit together.
    """

    CLASS_NAME: ClassVar[str] = "AutoencoderTiny"
    FIXED: ClassVar = {
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "shift_factor": (0.0, None),
        # diffusers itself sets it to false, whatever the file says.
        "force_upcast": (False, True),
    }
    # A copy of `decoder_block_out_channels` that diffusers writes.
    IGNORED: ClassVar = frozenset({"block_out_channels"})

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0

    def __post_init__(self):
        for side in ("encoder", "decoder"):
            widths = getattr(self, f"{side}_block_out_channels")
            blocks = getattr(self, f"num_{side}_blocks")
            if len(widths) != len(blocks):
                raise ValueError(
                    f"{side}_block_out_channels={widths} and num_{side}_blocks={blocks} differ in length"
                )
            # No layer of diffusers' definition leads from one width to another.
            if len(set(widths)) != 1:
                raise ValueError(f"{side}_block_out_channels={widths} is not supported (only equal widths)")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} is not supported (only {', '.join(ACTIVATIONS)})")

    @property
    def downsampling(self) -> int:
        """The number of pixels on the side of one latent."""
        return 2 ** (len(self.decoder_block_out_channels) - 1)


class Activation(Module):
    """An activation that takes a place in a sequence, so that its neighbours are numbered as in PyTorch."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.name](x)


class Upsample(Module):
    """A doubling of height and width that takes a place in a sequence."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return upsample_nearest(x)


class AutoencoderTinyBlock(Module):
    """Three convolutions with a residual connection around them."""

    def __init__(self, channels: int, activation: str, rngs: nnx.Rngs):
        self.conv = nnx.List(
            [
                Conv(channels, channels, 3, rngs=rngs),
                Activation(activation),
                Conv(channels, channels, 3, rngs=rngs),
                Activation(activation),
                Conv(channels, channels, 3, rngs=rngs),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        # ReLU whatever `act_fn` says, as in diffusers.
        return jax.nn.relu(_run(self.conv, x) + x)


class EncoderTiny(Module):
    """Images [B, H, W, in_channels] in [-1, 1] to latents [B, h, w, latent_channels]."""

    def __init__(self, config: TinyVAEConfig, rngs: nnx.Rngs):
        width = config.encoder_block_out_channels[0]
        layers: list[nnx.Module] = []
        for i, blocks in enumerate(config.num_encoder_blocks):
            if i == 0:
                layers.append(Conv(config.in_channels, width, 3, rngs=rngs))
            else:
                layers.append(Conv(width, width, 3, stride=2, use_bias=False, rngs=rngs))
            layers += [AutoencoderTinyBlock(width, config.act_fn, rngs) for _ in range(blocks)]
        layers.append(Conv(width, config.latent_channels, 3, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        # TAESD works on images in [0, 1].
        return _run(self.layers, (x + 1) / 2)


class DecoderTiny(Module):
    """Latents [B, h, w, latent_channels] to images [B, H, W, out_channels], meant for [-1, 1]."""

    def __init__(self, config: TinyVAEConfig, rngs: nnx.Rngs):
        width = config.decoder_block_out_channels[0]
        last = len(config.num_decoder_blocks) - 1
        layers: list[nnx.Module] = [
            Conv(config.latent_channels, width, 3, rngs=rngs),
            Activation(config.act_fn),
        ]
        for i, blocks in enumerate(config.num_decoder_blocks):
            layers += [AutoencoderTinyBlock(width, config.act_fn, rngs) for _ in range(blocks)]
            if i < last:
                layers += [Upsample(), Conv(width, width, 3, use_bias=False, rngs=rngs)]
            else:
                layers.append(Conv(width, config.out_channels, 3, rngs=rngs))
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _run(self.layers, jnp.tanh(x / 3) * 3) * 2 - 1


class AutoencoderTiny(Module):
    """A small autoencoder on Stable Diffusion's latents (Ollin Boer Bohan's TAESD)."""

    def __init__(self, config: TinyVAEConfig, rngs: nnx.Rngs):
        self.encoder = EncoderTiny(config, rngs)
        self.decoder = DecoderTiny(config, rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Returns latents [B, H/f, W/f, latent_channels] of images [B, H, W, in_channels] in [-1, 1].

        f is 2 for every stage after the encoder's first; a size that it does not divide is rounded up.
        """
        return self.encoder(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Returns images [B, h * f, w * f, out_channels] of latents [B, h, w, latent_channels].

        f is `TinyVAEConfig.downsampling`. Latents are squashed smoothly to (-3, 3) first. Images are meant
        for [-1, 1], but not clipped to it.
        """
        return self.decoder(latents)


def _run(layers: nnx.List, x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x
