"""The spatial transformer of the UNet: self-attention, cross-attention to the text, gated feed-forward."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.attention import Core, attention
from sbv2_jax.models.layers import ACTIVATIONS, Conv, GroupNorm, LayerNorm, Linear
from sbv2_jax.models.module import Module


class Steered(NamedTuple):
    """A context [B, M, C] with one to keep away from, [B, K, C], and how strongly.

    Cross-attention to `away`, times `scale`, is taken from that to `context`: a negative prompt for a network that is
    called without guidance. Source: NASA, of SNOOPI (Nguyen et al., 2024).
    """

    context: jax.Array
    away: jax.Array
    scale: jax.Array


# What the UNet attends to beside itself.
Context = jax.Array | Steered


class Attention(Module):
    """Multi-head attention of [B, N, channels] to itself, or to a context [B, M, context_channels]."""

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        head_dim: int,
        core: Core | None,
        rngs: nnx.Rngs,
    ):
        inner = heads * head_dim
        self.heads = heads
        self._core = core
        self.to_q = Linear(channels, inner, use_bias=False, rngs=rngs)
        self.to_k = Linear(context_channels, inner, use_bias=False, rngs=rngs)
        self.to_v = Linear(context_channels, inner, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([Linear(inner, channels, rngs=rngs)])

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        query = self.to_q(x)
        if not isinstance(context, Steered):
            return self.to_out[0](self._attend(query, context))
        away = context.scale.astype(x.dtype) * self._attend(query, context.away)
        return self.to_out[0](self._attend(query, context.context) - away)

    def _attend(self, query: jax.Array, context: jax.Array) -> jax.Array:
        return attention(query, self.to_k(context), self.to_v(context), self.heads, core=self._core)


class GEGLU(Module):
    """A dense layer whose second half gates the first (Shazeer, 2020, equation 6)."""

    def __init__(self, channels: int, inner: int, rngs: nnx.Rngs):
        self.proj = Linear(channels, 2 * inner, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * ACTIVATIONS["gelu"](gate)


class Dropout(Module):
    """Dropout at rate 0: it only keeps the next layer's index in its list the one of the checkpoint."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class FeedForward(Module):
    """The gated feed-forward layer, four times as wide inside."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        inner = 4 * channels
        self.net = nnx.List([GEGLU(channels, inner, rngs), Dropout(), Linear(inner, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual."""

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        head_dim: int,
        core: Core | None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = LayerNorm(channels, 1e-5, rngs)
        self.attn1 = Attention(channels, channels, heads, head_dim, core, rngs)
        self.norm2 = LayerNorm(channels, 1e-5, rngs)
        self.attn2 = Attention(channels, context_channels, heads, head_dim, core, rngs)
        self.norm3 = LayerNorm(channels, 1e-5, rngs)
        self.ff = FeedForward(channels, rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(Module):
    """Transformer blocks over the pixels of [B, H, W, C], between two projections, with a residual."""

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        heads: int,
        layers: int,
        groups: int,
        linear_projection: bool,
        core: Core | None = None,
        rngs: nnx.Rngs,
    ):
        # As in diffusers: where the heads do not divide the channels, the inner width is the smaller.
        head_dim = channels // heads
        inner = heads * head_dim
        self.norm = GroupNorm(groups, channels, 1e-6, rngs)
        self.proj_in: Linear | Conv
        self.proj_out: Linear | Conv
        if linear_projection:  # SD 2.x, SDXL
            self.proj_in = Linear(channels, inner, rngs=rngs)
            self.proj_out = Linear(inner, channels, rngs=rngs)
        else:  # SD 1.x
            self.proj_in = Conv(channels, inner, 1, rngs=rngs)
            self.proj_out = Conv(inner, channels, 1, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(inner, context_channels, heads, head_dim, core, rngs)
                for _ in range(layers)
            ]
        )

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        batch, height, width, _ = x.shape
        hidden = self.proj_in(self.norm(x))
        hidden = hidden.reshape(batch, height * width, -1)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        return self.proj_out(hidden.reshape(batch, height, width, -1)) + x
