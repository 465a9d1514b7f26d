"""The KL autoencoder of Stable Diffusion, both ways, with diffusers' module names."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.attention import attention
from sbv2_jax.models.config import AutoencoderConfig
from sbv2_jax.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear
from sbv2_jax.models.module import Module
from sbv2_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

# diffusers fixes it for the whole autoencoder; the UNet's is another.
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(AutoencoderConfig):
    """The fields of an `AutoencoderKL`'s `config.json`; the defaults are diffusers' own.

    Callers multiply latents by `scaling_factor` after `encode` and divide by it before `decode`.
    `sample_size` and `force_upcast` change nothing here; they are kept to be written back as they were.
    Raises ValueError where widths, block types or groups do not fit together.
    """

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    FIXED: ClassVar = {"shift_factor": (None, 0.0), "latents_mean": (None,), "latents_std": (None,)}

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        for field, supported in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if tuple(getattr(self, field)) != (supported,) * len(self.block_out_channels):
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is not supported "
                    f"(only {supported!r}, once for each of block_out_channels={self.block_out_channels})"
                )
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} is not supported (only {', '.join(ACTIVATIONS)})")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"norm_num_groups={self.norm_num_groups} does not divide "
                f"every one of block_out_channels={self.block_out_channels}"
            )

    @property
    def downsampling(self) -> int:
        """The number of pixels on the side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class Attention(Module):
    """Single-head self-attention over the pixels, with its normalisation and residual connection."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, channels, EPSILON, rngs)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        # A list, because PyTorch's has a dropout at index 1.
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, channels] to the same shape."""
        batch, height, width, channels = x.shape
        hidden = self.group_norm(x).reshape(batch, height * width, channels)
        hidden = attention(self.to_q(hidden), self.to_k(hidden), self.to_v(hidden), heads=1)
        return x + self.to_out[0](hidden).reshape(x.shape)


class DownEncoderBlock2D(Module):
    """Residual blocks, then a halving of the resolution unless the block is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, config: VAEConfig, *, downsample: bool, rngs: nnx.Rngs
    ):
        widths = (in_channels,) + (out_channels,) * config.layers_per_block
        self.resnets = _resnets(widths, config, rngs)
        self.downsamplers = nnx.List(
            [Downsample2D(out_channels, out_channels, padding=0, rngs=rngs)] if downsample else []
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H/2, W/2, out_channels]; the last block keeps H and W."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(Module):
    """Residual blocks, one more than in the encoder, then a doubling of the resolution unless the last."""

    def __init__(
        self, in_channels: int, out_channels: int, config: VAEConfig, *, upsample: bool, rngs: nnx.Rngs
    ):
        widths = (in_channels,) + (out_channels,) * (config.layers_per_block + 1)
        self.resnets = _resnets(widths, config, rngs)
        self.upsamplers = nnx.List([Upsample2D(out_channels, out_channels, rngs)] if upsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, 2H, 2W, out_channels]; the last block keeps H and W."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class UNetMidBlock2D(Module):
    """Two residual blocks with attention in between, where the configuration has it."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        channels = config.block_out_channels[-1]
        self.resnets = _resnets((channels,) * 3, config, rngs)
        self.attentions = nnx.List(
            [Attention(channels, config.norm_num_groups, rngs)] if config.mid_block_add_attention else []
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(Module):
    """Images [B, H, W, in_channels] to mean and log-variance, [B, h, w, 2 * latent_channels]."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = Conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(widths[max(i - 1, 0)], width, config, downsample=i < last, rngs=rngs)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = UNetMidBlock2D(config, rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], EPSILON, rngs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        # SiLU whatever `act_fn` says, as in diffusers.
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(Module):
    """Latents [B, h, w, latent_channels] to images [B, H, W, out_channels]."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = Conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = UNetMidBlock2D(config, rngs)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(widths[max(i - 1, 0)], width, config, upsample=i < last, rngs=rngs)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], EPSILON, rngs)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(Module):
    """The autoencoder of latent diffusion (Rombach et al., 2022), on latents that are not scaled."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv(channels, channels, 1, rngs=rngs) if config.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log-variance of the latents, each [B, H/f, W/f, latent_channels].

        `images` is [B, H, W, in_channels] in [-1, 1] and f is `VAEConfig.downsampling`; sizes round down. The
        log-variance lies in [-30, 20]. A sample is mean + exp(log_variance / 2) * noise.
        """
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Returns images [B, h * f, w * f, out_channels], meant for [-1, 1], but not clipped to it.

        `latents` is [B, h, w, latent_channels], already divided by `scaling_factor`.
        """
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def _resnets(widths: tuple[int, ...], config: VAEConfig, rngs: nnx.Rngs) -> nnx.List:
    """Residual blocks from each width to the next."""
    return nnx.List(
        [
            ResnetBlock2D(
                before,
                after,
                groups=config.norm_num_groups,
                epsilon=EPSILON,
                activation=config.act_fn,
                rngs=rngs,
            )
            for before, after in zip(widths, widths[1:], strict=False)
        ]
    )
