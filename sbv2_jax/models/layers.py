"""Layers that every model shares: linear with an optional LoRA, convolution, normalisation."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.module import Module, NoPytree

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    # CLIP's first release approximated GELU so; its weights depend on it.
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def shape_only(_: None, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Stands for the initialiser of a parameter: layers are built for their shapes alone.

    The values come from a checkpoint or from `Network.init`. Without a value to trace, a network of Stable
    Diffusion's size is built in a fraction of the time.
    """
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[return-value]  # an array before each call


class LoRAScale(nnx.Variable):
    """The factor on a LoRA's output: a scalar, or one for each sample of the batch [B]."""


class LoRA(Module):
    """A low-rank update, `scale * (x @ down) @ up` (Hu et al., 2021, equation 3)."""

    def __init__(self, in_features: int, out_features: int, rank: int, rngs: nnx.Rngs):
        self.down = nnx.Linear(in_features, rank, use_bias=False, kernel_init=shape_only, rngs=rngs)
        self.up = nnx.Linear(rank, out_features, use_bias=False, kernel_init=shape_only, rngs=rngs)
        self.scale = LoRAScale(shape_only(None, ()))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale.get_value().astype(x.dtype)
        return self.up(self.down(x)) * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))


class Linear(NoPytree, nnx.Linear):
    """A dense layer that a LoRA can be attached to (`lora.attach`)."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=shape_only,
            bias_init=shape_only,
            rngs=rngs,
        )
        self.lora: LoRA | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # the mesh's axes are automatic
        y = super().__call__(x)
        return y if self.lora is None else y + self.lora(x)


class Conv(NoPytree, nnx.Conv):
    """A 2-D convolution over [B, H, W, C] with PyTorch's symmetric padding.

    `kernel` is its side, or height and width. `padding` is in pixels on each side; "SAME" is TensorFlow's, which pads a
    strided convolution more at the right and at the bottom. A kernel sees the channels of one of `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | Literal["SAME"] | None = None,
        groups: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads: Literal["SAME"] | tuple[tuple[int, int], ...] = "SAME"
        if padding != "SAME":
            each = [side // 2 if padding is None else padding for side in sides]
            pads = tuple((pad, pad) for pad in each)
        super().__init__(
            in_channels,
            out_channels,
            sides,
            strides=(stride, stride),
            padding=pads,
            feature_group_count=groups,
            use_bias=use_bias,
            kernel_init=shape_only,
            bias_init=shape_only,
            rngs=rngs,
        )


class Embed(NoPytree, nnx.Embed):
    """A table of vectors [n, features]."""

    def __init__(self, n: int, features: int, rngs: nnx.Rngs):
        super().__init__(n, features, embedding_init=shape_only, rngs=rngs)
        self.dtype = None  # nnx sets float32 and would cast bfloat16 parameters to it


class GroupNorm(NoPytree, nnx.GroupNorm):
    """Group normalisation with float32 statistics."""

    def __init__(self, groups: int, channels: int, epsilon: float, rngs: nnx.Rngs):
        # The fast variance E[x^2] - E[x]^2 cancels where the mean is large, as it is deep in these networks.
        super().__init__(
            channels,
            groups,
            epsilon=epsilon,
            use_fast_variance=False,
            scale_init=shape_only,
            bias_init=shape_only,
            rngs=rngs,
        )


class LayerNorm(NoPytree, nnx.LayerNorm):
    """Layer normalisation over the last axis with float32 statistics."""

    def __init__(self, channels: int, epsilon: float, rngs: nnx.Rngs):
        super().__init__(
            channels,
            epsilon=epsilon,
            use_fast_variance=False,
            scale_init=shape_only,
            bias_init=shape_only,
            rngs=rngs,
        )


class BatchNorm(Module):
    """Batch normalisation of [B, H, W, C] by the running statistics that a trained network carries."""

    def __init__(self, channels: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(shape_only(None, (channels,)))
        self.bias = nnx.Param(shape_only(None, (channels,)))
        self.running_mean = nnx.Param(shape_only(None, (channels,)))
        self.running_var = nnx.Param(shape_only(None, (channels,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.scale.get_value() * jax.lax.rsqrt(self.running_var.get_value() + self.epsilon)
        shift = self.bias.get_value() - self.running_mean.get_value() * factor
        return x * factor.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)


def sinusoidal_embedding(
    timesteps: jax.Array, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> jax.Array:
    """Sinusoidal embedding of timesteps [B] into float32 [B, dim] (Ho et al., 2020, as diffusers lays it out)."""
    half = dim // 2
    exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    out = jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)
    return jnp.pad(out, ((0, 0), (0, dim % 2)))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Doubles height and width of [B, H, W, C] by repeating pixels."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
