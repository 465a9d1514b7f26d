"""OpenCLIP's own files, `open_clip_config.json` and weights, to a CLIP in the layout of transformers.

The names are those of `formats.openclip_names`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.checkpoint.finite import is_finite
from sbv2_jax.convert.formats.component import Component, write_component
from sbv2_jax.convert.formats.files import file_of, new_directory, read_json
from sbv2_jax.convert.formats.finite import refuse_not_finite
from sbv2_jax.convert.formats.names import params_from_torch
from sbv2_jax.convert.formats.openclip_names import Source, sources_of, tensor_of
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.safetensors_io import (
    DTYPES,
    PICKLE_SUFFIXES,
    TensorInfo,
    read_header,
    read_tensors,
)
from sbv2_jax.convert.formats.side_files import copy_clip_files, write_preprocessor
from sbv2_jax.convert.formats.torch_files import read_torch_file
from sbv2_jax.convert.formats.weight_files import open_weights
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sbv2_jax.models.clip_image import CLIP_MEAN, CLIP_STD, CLIPImageConfig
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.registry import network

# The files of a CLIP: its configuration, and the beginning of the names of its weights.
CONFIG, STEM = "open_clip_config.json", "open_clip_model"
# What files of early versions hold besides parameters.
_NOT_READ = frozenset({"attn_mask", "context_length", "input_resolution", "vocab_size"})
# Variants of the transformer block, and of the layer that ends a tower: all of them off.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,),
    "final_ln_after_pool": (False,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Vision(ModelConfig):
    FIXED = _PLAIN | {
        "attentional_pool": (False,),
        "no_ln_pre": (False,),
        "pos_embed_type": ("learnable",),
        "pool_type": ("tok",),
        "global_average_pool": (False,),
        "input_patchnorm": (False,),
        "timm_model_name": (None,),
    }
    IGNORED = frozenset({"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"})

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text(ModelConfig):
    FIXED = _PLAIN | {
        "embed_cls": (False,),
        "no_causal_mask": (False,),
        "pool_type": ("argmax",),
        "proj_bias": (False,),
        "proj_type": ("linear",),
        "hf_model_name": (None,),
    }
    IGNORED = frozenset(
        {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens", "pad_id", "eos_id"}
    )

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model(ModelConfig):
    FIXED = {"nonscalar_logit_scale": (False,), "init_logit_bias": (None,), "custom_text": (False,)}
    IGNORED = frozenset({"init_logit_scale", "cast_dtype", "output_dict", "vision_cfg", "text_cfg"})

    embed_dim: int
    quick_gelu: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pictures(ModelConfig):
    # The side is the network's; how another shape is made square does not matter to a square picture.
    FIXED = {"mode": ("RGB",), "interpolation": ("bicubic",)}
    IGNORED = frozenset({"size", "resize_mode", "fill_color"})

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def convert(model: str | Path, out: str | Path, *, weights: str | Path | None = None) -> None:
    """Writes a CLIP of OpenCLIP as a directory that transformers, and this package, load; types are kept.

    A tokenizer that lies beside it is copied. Raises InputError as `load` does, and writes nothing then.
    """
    directory = find(model, weights)
    clip, image = load(directory, weights=weights)
    with new_directory(out) as partial:
        write_component(partial, clip.config, clip.params)
        copy_clip_files(directory, partial)
        write_preprocessor(partial, image)  # over one that was copied


def find(model: str | Path, weights: str | Path | None = None) -> Path:
    """Returns the directory of a CLIP of OpenCLIP, a path or a hub id; raises InputError as `resolve` does.

    With `weights` of its own nothing but its small files is fetched.
    """
    # the same CLIP may lie there for transformers, as large
    return resolve(model, stems=(STEM,) if weights is None else ())


def load(
    directory: Path, *, weights: str | Path | None = None
) -> tuple[Component[CLIPConfig], CLIPImageConfig]:
    """Reads a CLIP of OpenCLIP: a directory with `open_clip_config.json` and `open_clip_model.safetensors`.

    `weights` is a file in place of the latter, also one of torch.save (`torch_files`), as HPSv2 is published. Raises
    InputError for settings that a CLIP of transformers does not have, and one that lists every missing and
    unexpected tensor, every wrong shape and type.
    """
    config, image = read_config(file_of(directory, CONFIG))
    sources = sources_of(network(config).shapes)
    source = str(directory if weights is None else weights)
    infos, read = _tensors(directory, None if weights is None else Path(weights).expanduser())
    _match(infos, sources, source)
    found = read({one.name for one in sources.values()})
    tensors = {name: tensor_of(found[one.name], one) for name, one in sources.items()}
    if wrong := [one.name for name, one in sources.items() if not is_finite(tensors[name])]:
        refuse_not_finite(list(dict.fromkeys(wrong)), source)
    return Component(config, params_from_torch(tensors, network(config).shapes)), image


def _tensors(
    directory: Path, weights: Path | None
) -> tuple[Mapping[str, TensorInfo], Callable[[set[str]], dict[str, np.ndarray]]]:
    """Returns what the file says of its tensors, and the function that reads those of some names."""
    if weights is None:
        stored = open_weights(directory, STEM)
        return stored.infos, lambda names: dict(stored.read(names, mapped=True))
    if weights.suffix not in PICKLE_SUFFIXES:
        infos = read_header(weights)
        return infos, lambda names: dict(
            read_tensors(weights, {name: infos[name] for name in names}, mapped=True)
        )
    arrays = read_torch_file(weights)
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    infos = {
        name: TensorInfo(kinds.get(array.dtype, str(array.dtype)), array.shape)
        for name, array in arrays.items()
    }
    return infos, lambda names: {name: arrays[name] for name in names}


def read_config(path: Path) -> tuple[CLIPConfig, CLIPImageConfig]:
    """Reads an `open_clip_config.json`: the network, and how it takes its pictures.

    Raises InputError that names the file and lists every field that is unknown or not supported.
    """
    values = read_json(path)
    model: Any = values.get("model_cfg")
    towers: list[Any] = [
        model.get(name) if isinstance(model, dict) else None for name in ("vision_cfg", "text_cfg")
    ]
    pictures = values.get("preprocess_cfg", {})
    if not all(isinstance(one, dict) for one in (*towers, pictures)):
        raise InputError(f"{path} has no model_cfg with a vision_cfg and a text_cfg")
    vision = _Vision.from_dict(towers[0], f"{path}, vision_cfg")
    text = _Text.from_dict(towers[1], f"{path}, text_cfg")
    both = _Model.from_dict(model, f"{path}, model_cfg")
    taken = _Pictures.from_dict(pictures, f"{path}, preprocess_cfg")
    try:
        return _to_transformers(both, vision, text), CLIPImageConfig(
            size=vision.image_size, crop_size=vision.image_size, image_mean=taken.mean, image_std=taken.std
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: {error}") from error


def _to_transformers(both: _Model, vision: _Vision, text: _Text) -> CLIPConfig:
    activation = "quick_gelu" if both.quick_gelu else "gelu"
    return CLIPConfig(
        architectures=("CLIPModel",),
        projection_dim=both.embed_dim,
        text_config=CLIPTextConfig(
            hidden_size=text.width,
            intermediate_size=int(text.width * text.mlp_ratio),
            num_attention_heads=text.heads,
            num_hidden_layers=text.layers,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
            # OpenCLIP takes the largest id of a text as its end: the last of the vocabulary.
            bos_token_id=text.vocab_size - 2,
            eos_token_id=text.vocab_size - 1,
            pad_token_id=0,
            hidden_act=activation,
            projection_dim=both.embed_dim,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=int(vision.width * vision.mlp_ratio),
            num_attention_heads=vision.width // vision.head_width,
            num_hidden_layers=vision.layers,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=activation,
            projection_dim=both.embed_dim,
        ),
    )


def _match(infos: Mapping[str, TensorInfo], sources: Mapping[str, Source], source: str) -> None:
    shapes: dict[str, Any] = {source.name: source.shape for source in sources.values()}
    wrong = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in infos]
    for name, info in infos.items():
        if name in _NOT_READ:
            continue
        if name not in shapes:
            wrong.append(f"unexpected {ascii(name)[1:-1]} {info.shape}")
            continue
        if info.shape != shapes[name]:
            wrong.append(f"{name} has shape {info.shape}, expected {shapes[name]}")
        if info.dtype not in DTYPES:
            wrong.append(f"{name} has type {info.dtype}, expected one of {', '.join(DTYPES)}")
    if wrong:
        raise InputError(
            f"{source} does not fit its open_clip_config.json in {len(wrong)} tensors: {listed(wrong)}"
        )
