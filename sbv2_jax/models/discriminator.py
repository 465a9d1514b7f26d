"""The head of a discriminator over a UNet's features."""

import jax
from flax import nnx

from sbv2_jax.models.layers import Conv, GroupNorm
from sbv2_jax.models.module import Module

# The largest side that one convolution brings down to a pixel.
_LAST = 4
_EPSILON = 1e-5  # PyTorch's default


class DiscriminatorHead(Module):
    """A convolutional classifier of the features [B, side, side, channels] of a UNet's middle block.

    Convolutions of 4 x 4 halve the side until it is 4 or less, one more brings it to 1, and the last to a logit; behind
    all others are normalisation and SiLU: DMD2's (Yin et al., 2024), for SD 1.5 and for SDXL.
    """

    def __init__(self, channels: int, side: int, groups: int, rngs: nnx.Rngs):
        convs = []
        while side > _LAST:
            convs.append(Conv(channels, channels, 4, stride=2, padding=1, rngs=rngs))
            side //= 2
        convs.append(Conv(channels, channels, side, padding=0, rngs=rngs))
        self.convs = nnx.List(convs)
        self.norms = nnx.List([GroupNorm(groups, channels, _EPSILON, rngs) for _ in convs])
        self.conv_out = Conv(channels, 1, 1, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns the logits, [B], large where the features are taken for those of real latents."""
        x = features
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.conv_out(x)[:, 0, 0, 0]
