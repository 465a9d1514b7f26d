"""The residual block and the two resizing layers that the UNet and the autoencoder share."""

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear, upsample_nearest
from sbv2_jax.models.module import Module


class ResnetBlock2D(Module):
    """Two normalised convolutions around a residual connection, the time embedding added in between.

    The default variant of diffusers' `ResnetBlock2D`. A block without `time_channels` takes no embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        activation: str = "silu",
        time_channels: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.norm1 = GroupNorm(groups, in_channels, epsilon, rngs)
        self.conv1 = Conv(in_channels, out_channels, 3, rngs=rngs)
        self.time_emb_proj = None if time_channels is None else Linear(time_channels, out_channels, rngs=rngs)
        self.norm2 = GroupNorm(groups, out_channels, epsilon, rngs)
        self.conv2 = Conv(out_channels, out_channels, 3, rngs=rngs)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else Conv(in_channels, out_channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array, emb: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, in_channels] to [B, H, W, out_channels]; emb is [B, time_channels]."""
        act = ACTIVATIONS[self.activation]
        hidden = self.conv1(act(self.norm1(x)))
        if self.time_emb_proj is not None:
            if emb is None:
                raise ValueError("a block with time_channels takes an embedding of the time")
            hidden = hidden + self.time_emb_proj(act(emb))[:, None, None, :]
        hidden = self.conv2(act(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden


class Downsample2D(Module):
    """Halves height and width by a strided 3x3 convolution.

    `padding` is 1 in the UNet; 0 stands for one pixel at the right and at the bottom, as in the autoencoder.
    """

    def __init__(self, channels: int, out_channels: int, *, padding: int, rngs: nnx.Rngs):
        self.padding = padding
        self.conv = Conv(channels, out_channels, 3, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, channels] to [B, H/2, W/2, out_channels], rounded up (padding 1) or down (0)."""
        if self.padding == 0:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(x)


class Upsample2D(Module):
    """Doubles height and width by repeating pixels, then convolves."""

    def __init__(self, channels: int, out_channels: int, rngs: nnx.Rngs):
        self.conv = Conv(channels, out_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, channels] to [B, 2H, 2W, out_channels]."""
        return self.conv(upsample_nearest(x))
