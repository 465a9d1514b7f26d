"""CLIP (Radford et al., 2021) as transformers defines it: the text tower alone, and both towers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.attention import attention
from sbv2_jax.models.config import TransformersConfig
from sbv2_jax.models.layers import ACTIVATIONS, Conv, Embed, LayerNorm, Linear, shape_only
from sbv2_jax.models.module import Module

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TowerConfig(TransformersConfig):
    """The fields that a text and a vision tower have in common."""

    hidden_size: int
    intermediate_size: int
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # The token ids may be 0, and two of them None.
            if field.type is int and (type(value) is not int or value < (not field.name.endswith("_id"))):
                raise ValueError(f"{field.name}={value!r} is not a positive integer")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported (only {', '.join(sorted(ACTIVATIONS))})"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(_TowerConfig):
    """The text tower; `text_encoder/config.json` of a pipeline."""

    FIXED = {"model_type": ("clip_text_model",), "attention_dropout": (0.0,), "pruned_heads": ({},)}

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    # Written back, but without influence: the tokenizer pads by its own files.
    bos_token_id: int | None = 49406
    pad_token_id: int | None = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(_TowerConfig):
    """The vision tower; `vision_config` of a CLIP's config.json."""

    FIXED = {"model_type": ("clip_vision_model",), "attention_dropout": (0.0,), "pruned_heads": ({},)}
    IGNORED = TransformersConfig.IGNORED | {"bos_token_id", "eos_token_id", "pad_token_id"}

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(TransformersConfig):
    """Both towers and the space that they share; the towers' own `projection_dim` is not read."""

    FIXED = {"model_type": ("clip",), "pruned_heads": ({},)}
    IGNORED = TransformersConfig.IGNORED | {"bos_token_id", "eos_token_id", "pad_token_id"}

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> Self:
        """Builds the configuration from the file's values, as `ModelConfig.from_dict` does."""
        values = dict(values)
        for name, config in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            # Files of 2022 hold each tower twice. transformers lets the deprecated copy win, with its
            # defaults for what it leaves out, and so the pooling rule of the text tower depends on it.
            deprecated = values.pop(f"{name}_dict", None)
            tower = (values.get(name) or {}) if deprecated is None else deprecated
            values[name] = config.from_dict(tower, f"{source}, {name}")
        return super().from_dict(values, source)


class TextOutput(NamedTuple):
    """The result of a text tower.

    `last_hidden_state` [B, S, D], after the final normalisation; `pooled` [B, D], or projected [B, P];
    `hidden_states`, if asked for: the embeddings, then every layer's output, [B, S, D] each, before the final
    normalisation. SDXL conditions on `hidden_states[-2]`.
    """

    last_hidden_state: jax.Array
    pooled: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None


class Attention(Module):
    """Multi-head self-attention over [B, S, D]."""

    def __init__(self, config: _TowerConfig, causal: bool, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        self.k_proj = Linear(dim, dim, rngs=rngs)
        self.v_proj = Linear(dim, dim, rngs=rngs)
        self.q_proj = Linear(dim, dim, rngs=rngs)
        self.out_proj = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=self.causal)
        return self.out_proj(out)


class MLP(Module):
    """The two dense layers of a block."""

    def __init__(self, config: _TowerConfig, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(Module):
    """One pre-norm transformer block."""

    def __init__(self, config: _TowerConfig, causal: bool, rngs: nnx.Rngs):
        self.self_attn = Attention(config, causal, rngs)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)
        self.mlp = MLP(config, rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(Module):
    """The blocks; returns the input and every block's output."""

    def __init__(self, config: _TowerConfig, causal: bool, rngs: nnx.Rngs):
        self.layers = nnx.List(EncoderLayer(config, causal, rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class TextEmbeddings(Module):
    """Tokens [B, S] to [B, S, D]."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.token_embedding = Embed(config.vocab_size, config.hidden_size, rngs)
        self.position_embedding = Embed(config.max_position_embeddings, config.hidden_size, rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        length, limit = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens are more than max_position_embeddings={limit}")
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))[None]


class TextTransformer(Module):
    """The causal text tower."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config, rngs)
        self.encoder = Encoder(config, True, rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, input_ids: jax.Array, *, output_hidden_states: bool = False) -> TextOutput:
        states = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(states[-1])
        # Old configurations say 2, wrongly; for them the end of the text is the largest id of the sequence.
        # Otherwise it is the first end-of-text token, since some tokenizers pad with that token.
        ends = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        position = jnp.argmax(ends, axis=1)[:, None, None]
        pooled = jnp.take_along_axis(last, position, axis=1)[:, 0]
        return TextOutput(last, pooled, tuple(states) if output_hidden_states else None)


class CLIPTextModel(Module):
    """A text encoder of Stable Diffusion: token ids [B, S], int32, to a `TextOutput`."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config, rngs)

    def __call__(self, input_ids: jax.Array, *, output_hidden_states: bool = False) -> TextOutput:
        return self.text_model(input_ids, output_hidden_states=output_hidden_states)


class CLIPTextModelWithProjection(Module):
    """SDXL's second text encoder: as `CLIPTextModel`, with `pooled` projected to [B, projection_dim]."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config, rngs)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, input_ids: jax.Array, *, output_hidden_states: bool = False) -> TextOutput:
        out = self.text_model(input_ids, output_hidden_states=output_hidden_states)
        return out._replace(pooled=self.text_projection(out.pooled))


class VisionEmbeddings(Module):
    """Pictures [B, H, W, C] to the class token and the patches, row by row: [B, 1 + N, D]."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        dim, patch, size = config.hidden_size, config.patch_size, config.image_size
        self.shape = (size, size, config.num_channels)
        self.class_embedding = nnx.Param(shape_only(None, (dim,)))
        self.patch_embedding = Conv(
            config.num_channels, dim, patch, stride=patch, padding=0, use_bias=False, rngs=rngs
        )
        self.position_embedding = Embed((size // patch) ** 2 + 1, dim, rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        if pixel_values.shape[1:] != self.shape:
            raise ValueError(f"pictures of shape {pixel_values.shape[1:]}, expected {self.shape}")
        patches = self.patch_embedding(pixel_values.astype(self.patch_embedding.kernel.dtype))
        batch, dim = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.class_embedding.get_value(), (batch, 1, dim))
        tokens = jnp.concatenate([first, patches.reshape(batch, -1, dim)], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class VisionTransformer(Module):
    """The vision tower: [B, H, W, C] to the normalised class token [B, D]."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config, rngs)
        self.pre_layrnorm = LayerNorm(dim, eps, rngs)  # transformers' spelling
        self.encoder = Encoder(config, False, rngs)
        self.post_layernorm = LayerNorm(dim, eps, rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return self.post_layernorm(states[-1][:, 0])


class CLIPModel(Module):
    """Both towers, projected into the space in which the CLIP loss takes the cosine."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        text, vision, dim = config.text_config, config.vision_config, config.projection_dim
        self.text_model = TextTransformer(text, rngs)
        self.vision_model = VisionTransformer(vision, rngs)
        self.visual_projection = Linear(vision.hidden_size, dim, use_bias=False, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(shape_only(None, ()))

    def text_features(self, input_ids: jax.Array) -> jax.Array:
        """Returns the text embeddings [B, projection_dim], not normalised, of token ids [B, S]."""
        return self.text_projection(self.text_model(input_ids).pooled)

    def image_features(self, pixel_values: jax.Array) -> jax.Array:
        """Returns the image embeddings [B, projection_dim], not normalised, of pictures [B, H, W, 3].

        `clip_image.preprocess` makes them. Raises ValueError if their side is not the `image_size`.
        """
        return self.visual_projection(self.vision_model(pixel_values))

    def __call__(self, input_ids: jax.Array, pixel_values: jax.Array) -> jax.Array:
        """Returns the logits [images, texts], float32: exp(logit_scale) times the cosine."""

        def unit(x: jax.Array) -> jax.Array:
            x = x.astype(jnp.float32)
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        images, texts = unit(self.image_features(pixel_values)), unit(self.text_features(input_ids))
        return jnp.exp(self.logit_scale.get_value().astype(jnp.float32)) * images @ texts.T


def without_influence(class_name: str, name: str) -> bool:
    """Whether a tensor of a file changes nothing of what a CLIP of this class computes.

    A whole CLIP's file serves as a text tower's too: its other tower and what joins the two is not asked for.
    """
    others: tuple[str, ...] = ("vision_model.", "visual_projection.", "logit_scale")
    if class_name == "CLIPTextModel":
        others += ("text_projection",)
    return class_name.startswith("CLIPText") and name.startswith(others)


def tensors_of_file(tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors of a CLIP file under the names of these models.

    Files of transformers 4 hold the `position_ids` as well, which are no parameters; transformers 5 writes a
    `CLIPTextModel` without the prefix `text_model.` (and reads it with or without).
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: tensor for name, tensor in kept.items()}
