"""OpenCLIP's names and tensors for the parameters of a CLIP of transformers.

OpenCLIP keeps the names of OpenAI's release: query, key and value in one tensor, and projections that multiply
from the right.
"""

from typing import NamedTuple

import numpy as np

from sbv2_jax.convert.formats.names import torch_names
from sbv2_jax.convert.formats.published_shapes import torch_shape
from sbv2_jax.tree import Shapes

# From the names of transformers to those of OpenCLIP, in this order.
_RENAMED = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.": "",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.": "visual.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    ".layer_norm": ".ln_",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.": ".attn.",
}
_THIRDS = ("q_proj.", "k_proj.", "v_proj.")
_TRANSPOSED = ("text_projection", "visual.proj")


class Source(NamedTuple):
    """Where a parameter is in OpenCLIP's file: the tensor's name and shape, and which third of it, or None."""

    name: str
    shape: tuple[int, ...]
    third: int | None


def sources_of(shapes: Shapes) -> dict[str, Source]:
    """Returns where every parameter, by the name of transformers, is to be found."""
    return {
        name: _source(name, torch_shape(ours, shapes[ours].shape))
        for name, ours in torch_names(shapes).items()
    }


def _source(name: str, shape: tuple[int, ...]) -> Source:
    for theirs, original in _RENAMED.items():
        name = name.replace(theirs, original)
    for third, part in enumerate(_THIRDS):
        if part in name:
            return Source(name.replace(part, "in_proj_"), (3 * shape[0], *shape[1:]), third)
    return Source(name, shape[::-1] if name in _TRANSPOSED else shape, None)


def tensor_of(array: np.ndarray, source: Source) -> np.ndarray:
    """Returns the tensor that transformers has, of the one in OpenCLIP's file."""
    if source.third is not None:
        return np.split(array, 3)[source.third]
    return array.T if source.name in _TRANSPOSED else array
