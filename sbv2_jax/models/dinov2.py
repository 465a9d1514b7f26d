"""DINOv2 (Oquab et al., 2023) as transformers defines it, under the names of the published files."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sbv2_jax.models.attention import attention
from sbv2_jax.models.config import TransformersConfig
from sbv2_jax.models.layers import ACTIVATIONS, Conv, LayerNorm, Linear, shape_only
from sbv2_jax.models.module import Module

# What the published network adds to the number of patches a side before it enlarges or shrinks its grid of
# positions (facebookresearch/dinov2, `interpolate_offset`): the grid is read at other places than without it.
PUBLISHED_OFFSET = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config(TransformersConfig):
    """The fields of a `Dinov2Model`'s `config.json`; `image_size` is the side of the pictures it was trained on."""

    FIXED = {
        "model_type": ("dinov2",),
        "attention_probs_dropout_prob": (0.0,),
        "hidden_dropout_prob": (0.0,),
        "drop_path_rate": (0.0,),
        "qkv_bias": (True,),
        "use_swiglu_ffn": (False,),
        "pruned_heads": ({},),
    }
    # The value that layer scales start from, and what makes of it the backbone of another network.
    IGNORED: ClassVar[frozenset[str]] = TransformersConfig.IGNORED | {
        "apply_layernorm",
        "layerscale_value",
        "out_features",
        "out_indices",
        "reshape_hidden_states",
        "stage_names",
        "use_mask_token",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name}={value!r} is not a positive integer")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported (only {', '.join(sorted(ACTIVATIONS))})"
            )
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise ValueError("hidden_size must be a multiple of the heads, image_size of patch_size")


class PatchEmbeddings(Module):
    """The projection of patches."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        patch = config.patch_size
        self.projection = Conv(
            config.num_channels, config.hidden_size, patch, stride=patch, padding=0, rngs=rngs
        )


class Embeddings(Module):
    """Pictures [B, H, W, C] to the class token and the patches, row by row, with their places: [B, 1 + N, D]."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.side = config.image_size // config.patch_size
        dim = config.hidden_size
        self.cls_token = nnx.Param(shape_only(None, (1, 1, dim)))
        self.position_embeddings = nnx.Param(shape_only(None, (1, self.side**2 + 1, dim)))
        self.patch_embeddings = PatchEmbeddings(config, rngs)

    def __call__(self, pixel_values: jax.Array, offset: float) -> jax.Array:
        patches = self.patch_embeddings.projection(pixel_values)
        batch, height, width, dim = patches.shape
        first = jnp.broadcast_to(self.cls_token.get_value(), (batch, 1, dim))
        tokens = jnp.concatenate([first, patches.reshape(batch, -1, dim)], axis=1)
        return tokens + self._places(height, width, offset)

    def _places(self, height: int, width: int, offset: float) -> jax.Array:
        places = self.position_embeddings.get_value()
        if (height, width) == (self.side, self.side):
            return places
        grid = places[0, 1:].reshape(self.side, self.side, -1)
        rows, columns = (bicubic_matrix(self.side, count, offset) for count in (height, width))
        grid = jnp.einsum("hi,ijd,wj->hwd", rows, grid, columns, precision="highest")
        return jnp.concatenate([places[:, :1], grid.reshape(1, height * width, -1)], axis=1)


def bicubic_matrix(before: int, after: int, offset: float = 0.0) -> np.ndarray:
    """Returns the weights, float32 [after, before], of PyTorch's bicubic interpolation along one axis.

    Without antialiasing, a = -0.75, and what is outside as its border. The step is before / (after + offset), as
    `interpolate(scale_factor=(after + offset) / before)` has it.
    """
    centres = (np.arange(after) + 0.5) * (before / (after + offset)) - 0.5
    weights = np.zeros((after, before))
    for row, centre in enumerate(centres):
        start = int(np.floor(centre))
        for place in range(start - 1, start + 3):
            weights[row, min(max(place, 0), before - 1)] += _cubic(abs(centre - place))
    return weights.astype(np.float32)


def _cubic(distance: float, a: float = -0.75) -> float:
    """The kernel of cubic convolution (Keys, 1981, equation 4)."""
    if distance <= 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance**2 + 1.0
    return a * (((distance - 5.0) * distance + 8.0) * distance - 4.0) if distance < 2.0 else 0.0


class SelfAttention(Module):
    """The three projections."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.query = Linear(dim, dim, rngs=rngs)
        self.key = Linear(dim, dim, rngs=rngs)
        self.value = Linear(dim, dim, rngs=rngs)


class SelfOutput(Module):
    """The projection of what the heads give."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.hidden_size, rngs=rngs)


class Attention(Module):
    """Multi-head self-attention over [B, N, D]."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.attention = SelfAttention(config, rngs)
        self.output = SelfOutput(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        of = self.attention
        return self.output.dense(attention(of.query(x), of.key(x), of.value(x), self.heads))


class LayerScale(Module):
    """A factor for each channel."""

    def __init__(self, config: Dinov2Config):
        self.lambda1 = nnx.Param(shape_only(None, (config.hidden_size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.lambda1.get_value().reshape(1, 1, -1)


class MLP(Module):
    """The two dense layers of a block."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.activation, inner = config.hidden_act, config.hidden_size * config.mlp_ratio
        self.fc1 = Linear(config.hidden_size, inner, rngs=rngs)
        self.fc2 = Linear(inner, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(Module):
    """One pre-norm transformer block, with a scale on each of its two branches."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)
        self.attention = Attention(config, rngs)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)
        self.mlp = MLP(config, rngs)
        self.layer_scale2 = LayerScale(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(Module):
    """The blocks."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.layer = nnx.List(Layer(config, rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layer:
            x = layer(x)
        return x


class Dinov2Model(Module):
    """The network: normalised pictures [B, H, W, C] to the class token [B, D] after the last normalisation."""

    def __init__(self, config: Dinov2Config, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, pixel_values: jax.Array, *, offset: float = PUBLISHED_OFFSET) -> jax.Array:
        """Returns the class token, FD-DINOv2's features (Stein et al., 2023).

        Sides are multiples of the patches'. Where they are not the `image_size`, the grid of positions is
        interpolated: with `offset` as the authors' code does, with 0 as transformers does.
        """
        return self.layernorm(self.encoder(self.embeddings(pixel_values, offset))[:, 0])
