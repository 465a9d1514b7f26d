"""The fields of a UNet's `config.json`."""

import dataclasses
from typing import Any, ClassVar

from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.layers import ACTIVATIONS

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(ModelConfig):
    """The fields of a diffusers `unet/config.json` that the network follows.

    `attention_head_dim` is the number of heads, one for all blocks or one for each: a misnomer of the file
    format. `upcast_attention` is kept for the file's sake: logits and softmax are always float32 here.
    """

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*(_DOWN[0],) * 3, _DOWN[1])
    mid_block_type: str | None = _MID[0]
    up_block_types: tuple[str, ...] = (_UP[1], *(_UP[0],) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "only_cross_attention": (False,),
        "mid_block_scale_factor": (1,),
        "dropout": (0.0,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    }
    # Read by diffusers only for an `addition_embed_type` that is not supported here.
    IGNORED: ClassVar[frozenset[str]] = frozenset({"addition_embed_type_num_heads"})

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} must have {levels} entries, one for each of block_out_channels")
        for name, types in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            if unknown := set(getattr(self, name)) - set(types):
                raise ValueError(f"{name} has unsupported {sorted(unknown)}; supported: {list(types)}")
        supported: dict[str, tuple[Any, ...]] = {
            "mid_block_type": _MID,
            "act_fn": tuple(ACTIVATIONS),
            "addition_embed_type": (None, "text_time"),
            "downsample_padding": (0, 1),
        }
        for name, allowed in supported.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; supported: {allowed}")
        if not isinstance(self.sample_size, int | None):
            raise ValueError(
                f"sample_size={self.sample_size!r} is not supported; supported: one whole number"
            )
        _ = self.added_dims
        for name in ("layers_per_block", "cross_attention_dim", "attention_head_dim"):
            self.per_level(name)
        for level in range(levels):
            for side in ("down", "mid", "up"):
                self.transformer_layers(side, level)

    @property
    def added_dims(self) -> tuple[int, int] | None:
        """The widths of the embedding of one number of `AddedConditions`, and of all of it; None where it takes none.

        Raises ValueError where the file leaves out one of the two.
        """
        if self.addition_embed_type is None:
            return None
        one, joined = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if one is None or joined is None:
            raise ValueError(
                f"addition_embed_type={self.addition_embed_type!r} needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )
        return one, joined

    def per_level(self, name: str) -> tuple[int, ...]:
        """Returns a field that may be one number for all levels as one number for each."""
        value, levels = getattr(self, name), len(self.block_out_channels)
        if isinstance(value, int):
            return (value,) * levels
        if len(value) != levels or not all(isinstance(item, int) for item in value):
            raise ValueError(f"{name}={value!r} must be one integer or {levels} of them")
        return value

    def transformer_layers(self, side: str, level: int) -> tuple[int, ...]:
        """Returns the depth of every transformer of a block; `level` is counted as on the way down.

        One number for all transformers of a level, or one for each (SSD-1B); then
        `reverse_transformer_layers_per_block` says those of the way up.
        """
        name, levels = "transformer_layers_per_block", len(self.block_out_channels)
        values, count = self.transformer_layers_per_block, self.per_level("layers_per_block")[level]
        values = (values,) * levels if isinstance(values, int) else values
        if side == "up":
            count += 1
            if self.reverse_transformer_layers_per_block is not None:
                name, values = f"reverse_{name}", self.reverse_transformer_layers_per_block[::-1]
            elif any(isinstance(value, tuple) for value in values):
                raise ValueError(f"{name}={values!r} needs a reverse_{name}")
        if len(values) != levels:
            raise ValueError(f"{name}={values!r} must be one integer or {levels} of them")
        value, count = (values[-1], 1) if side == "mid" else (values[level], count)
        depths = (value,) * count if isinstance(value, int) else value[:1] if side == "mid" else value
        if len(depths) != count or not all(isinstance(depth, int) for depth in depths):
            raise ValueError(
                f"{name}={values!r} must have {count} integers for the transformers of level {level}"
            )
        return depths
