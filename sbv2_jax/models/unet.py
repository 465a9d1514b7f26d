"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL, module for module as in diffusers."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sbv2_jax.models.attention import Core
from sbv2_jax.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear, sinusoidal_embedding
from sbv2_jax.models.module import Module
from sbv2_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from sbv2_jax.models.transformer import Context, Transformer2DModel
from sbv2_jax.models.unet_config import UNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the network is computed, which changes its numbers by rounding alone.

    With `remat`, the activations inside each resnet and transformer are computed again in the backward pass, not
    kept. `core` computes the attention; without one, XLA does.
    """

    remat: bool = False
    core: Core | None = None


PLAIN = Execution()


class AddedConditions(NamedTuple):
    """SDXL's conditions beside the text: pooled text [B, D], and sizes and crop in pixels [B, 6]."""

    text_embeds: jax.Array
    time_ids: jax.Array


class TimestepEmbedding(Module):
    """Two dense layers over an embedding."""

    def __init__(self, in_features: int, features: int, activation: str, rngs: nnx.Rngs):
        self.activation = activation
        self.linear_1 = Linear(in_features, features, rngs=rngs)
        self.linear_2 = Linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        activation=config.act_fn,
        time_channels=4 * config.block_out_channels[0],
        rngs=rngs,
    )


def _transformers(
    config: UNetConfig, side: str, level: int, core: Core | None, rngs: nnx.Rngs
) -> list[Transformer2DModel]:
    depths = config.transformer_layers(side, level)
    return [_transformer(config, level, depth, core, rngs) for depth in depths]


def _transformer(
    config: UNetConfig, level: int, layers: int, core: Core | None, rngs: nnx.Rngs
) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        config.per_level("cross_attention_dim")[level],
        heads=config.per_level("attention_head_dim")[level],
        layers=layers,
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        core=core,
        rngs=rngs,
    )


class _Block(Module):
    """What the down, mid and up blocks share: resnets and, where the block attends, transformers."""

    def __init__(self, execution: Execution):
        self._remat = execution.remat

    def _call(self, module: nnx.Module, *args: Context) -> jax.Array:
        call = type(module).__call__
        return nnx.remat(call)(module, *args) if self._remat else call(module, *args)


class DownBlock(_Block):
    """One level on the way down; returns its output and what the way up will take from it."""

    def __init__(self, config: UNetConfig, level: int, execution: Execution, rngs: nnx.Rngs):
        super().__init__(execution)
        channels = config.block_out_channels[level]
        layers = config.per_level("layers_per_block")[level]
        inputs = [config.block_out_channels[max(level - 1, 0)]] + [channels] * (layers - 1)
        self.attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        if self.attends:
            self.attentions = nnx.List(_transformers(config, "down", level, execution.core, rngs))
        self.resnets = nnx.List([_resnet(config, width, channels, rngs) for width in inputs])
        if level < len(config.block_out_channels) - 1:
            self.downsamplers = nnx.List(
                [Downsample2D(channels, channels, padding=config.downsample_padding, rngs=rngs)]
            )

    def __call__(self, x: jax.Array, emb: jax.Array, context: Context) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self._call(resnet, x, emb)
            if self.attends:
                x = self._call(self.attentions[i], x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(_Block):
    """The lowest level: a resnet and, where it attends, a transformer and a second resnet."""

    def __init__(self, config: UNetConfig, execution: Execution, rngs: nnx.Rngs):
        super().__init__(execution)
        channels = config.block_out_channels[-1]
        self.attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        if self.attends:
            self.attentions = nnx.List(_transformers(config, "mid", -1, execution.core, rngs))
        self.resnets = nnx.List(
            [_resnet(config, channels, channels, rngs) for _ in range(2 if self.attends else 1)]
        )

    def __call__(self, x: jax.Array, emb: jax.Array, context: Context) -> jax.Array:
        x = self._call(self.resnets[0], x, emb)
        if self.attends:
            x = self._call(self.attentions[0], x, context)
            x = self._call(self.resnets[1], x, emb)
        return x


class UpBlock(_Block):
    """One level on the way up, `level` counted as on the way down; takes the skips from the end of the list."""

    def __init__(self, config: UNetConfig, level: int, block_type: str, execution: Execution, rngs: nnx.Rngs):
        super().__init__(execution)
        widths = config.block_out_channels
        channels, below = widths[level], widths[min(level + 1, len(widths) - 1)]
        layers = config.per_level("layers_per_block")[level] + 1
        inputs = [below] + [channels] * (layers - 1)
        skips = [channels] * (layers - 1) + [widths[max(level - 1, 0)]]
        self.attends = block_type == "CrossAttnUpBlock2D"
        if self.attends:
            self.attentions = nnx.List(_transformers(config, "up", level, execution.core, rngs))
        self.resnets = nnx.List(
            [_resnet(config, width + skip, channels, rngs) for width, skip in zip(inputs, skips, strict=True)]
        )
        if level > 0:
            self.upsamplers = nnx.List([Upsample2D(channels, channels, rngs)])

    def __call__(
        self, x: jax.Array, skips: list[jax.Array], emb: jax.Array, context: Context
    ) -> tuple[jax.Array, list[jax.Array]]:
        for i, resnet in enumerate(self.resnets):
            x = self._call(resnet, jnp.concatenate([x, skips[-1 - i]], axis=-1), emb)
            if self.attends:
                x = self._call(self.attentions[i], x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x)
        return x, skips[: -len(self.resnets)]


class UNet2DConditionModel(Module):
    """Predicts epsilon or v from noisy latents, timesteps and text."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs, *, execution: Execution = PLAIN):
        widths = config.block_out_channels
        time_channels = 4 * widths[0]
        self.config = config
        self.conv_in = Conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels, config.act_fn, rngs)
        if config.added_dims is not None:
            _, added = config.added_dims
            self.add_embedding = TimestepEmbedding(added, time_channels, config.act_fn, rngs)
        self.down_blocks = nnx.List(
            [DownBlock(config, level, execution, rngs) for level in range(len(widths))]
        )
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(config, execution, rngs)
        self.up_blocks = nnx.List(
            [
                UpBlock(config, len(widths) - 1 - i, block_type, execution, rngs)
                for i, block_type in enumerate(config.up_block_types)
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps, rngs)
        self.conv_out = Conv(widths[0], config.out_channels, 3, rngs=rngs)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        context: Context,
        added: AddedConditions | None = None,
    ) -> jax.Array:
        """Returns the network's output, float32 [B, h, w, out_channels], whatever the dtype of the latents.

        latents [B, h, w, in_channels], timesteps [B], context [B, S, cross_attention_dim] from the text
        encoder, or `Steered` away from another; `added` only, and then always, for SDXL. Raises ValueError where h
        or w is not a multiple of the total downsampling.
        """
        x, skips, emb = self._downwards(latents, timesteps, context, added)
        for up in self.up_blocks:
            x, skips = up(x, skips, emb, context)
        x = ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x))
        # In float32, to the last bit: what is rounded here is divided by a_t, 0.07 at the last timestep.
        return self.conv_out(x.astype(jnp.float32))

    def middle(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        context: Context,
        added: AddedConditions | None = None,
    ) -> jax.Array:
        """Returns the features of the middle block, [B, h / f, w / f, block_out_channels[-1]], as the latents' dtype.

        f is the total downsampling; a network without that block has what it would be given. Arguments and errors are
        those of a call.
        """
        return self._downwards(latents, timesteps, context, added)[0]

    def _downwards(
        self, latents: jax.Array, timesteps: jax.Array, context: Context, added: AddedConditions | None
    ) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        """Returns what the middle block gives, what the way up will take, and the embedding of the time."""
        factor = 2 ** (len(self.down_blocks) - 1)
        if latents.shape[1] % factor or latents.shape[2] % factor:
            raise ValueError(f"latents of {latents.shape[1:3]} are not multiples of {factor}")
        emb = self._embed(timesteps, added, latents.dtype)
        x = self.conv_in(latents)
        skips = [x]
        for down in self.down_blocks:
            x, outputs = down(x, emb, context)
            skips += outputs
        if hasattr(self, "mid_block"):
            x = self.mid_block(x, emb, context)
        return x, skips, emb

    def _embed(self, timesteps: jax.Array, added: AddedConditions | None, dtype: jnp.dtype) -> jax.Array:
        config = self.config

        def sinusoids(values: jax.Array, dim: int) -> jax.Array:
            return sinusoidal_embedding(
                values, dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
            )

        emb = self.time_embedding(sinusoids(timesteps, config.block_out_channels[0]).astype(dtype))
        if (added is not None) != (config.added_dims is not None):
            raise ValueError(f"added conditions do not fit addition_embed_type={config.addition_embed_type}")
        if added is not None and config.added_dims is not None:
            sizes = sinusoids(added.time_ids.reshape(-1), config.added_dims[0])
            sizes = sizes.reshape(added.time_ids.shape[0], -1)
            joined = jnp.concatenate([added.text_embeds, sizes.astype(added.text_embeds.dtype)], axis=-1)
            emb = emb + self.add_embedding(joined.astype(dtype))
        return emb
