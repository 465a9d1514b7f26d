"""Which published family a network's shapes are those of, for the error that says so."""

from collections.abc import Mapping

import numpy as np

from sbv2_jax.convert.formats.names import to_torch, torch_name
from sbv2_jax.models import published
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.registry import class_of, config_class, network
from sbv2_jax.tree import Shapes

# What is smaller is no network of these families; tracing them all takes seconds.
_FEWEST = 150
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a parameter's tensor in PyTorch's axes' order; `name` and `shape` are ours."""
    return to_torch(name, np.broadcast_to(np.float32(0), shape)).shape


def torch_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor, by PyTorch's name, of a network whose parameters have these shapes."""
    return {torch_name(name): torch_shape(name, leaf.shape) for name, leaf in shapes.items()}


def family_text(class_name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns `; its shapes are those of sdxl` for an error's text.

    `shapes` are those of a file's tensors, by PyTorch's names. Empty where more than one in fifty differ from those
    of every family in `published.ARCHITECTURES`.
    """
    if len(shapes) < _FEWEST:
        return ""
    found = []
    for family, parts in published.ARCHITECTURES.items():
        for part, known in _CLASSES.items():
            if part in parts and known == class_name:
                theirs = torch_shapes(network(config_class(class_name).from_dict(parts[part])).shapes)
                differing = sum(
                    shapes.get(name) != theirs.get(name) for name in shapes.keys() | theirs.keys()
                )
                found.append((differing, family))
    differing, family = min(found, default=(len(shapes), ""))
    if differing > len(shapes) // 50:
        return ""
    return f"; its shapes are those of {family}" + (f", but for {differing} tensors" if differing else "")


def family_of_config(config: ModelConfig) -> str:
    """Returns what `family_text` does of the shapes that a configuration asks for."""
    return family_text(class_of(config), torch_shapes(network(config).shapes))
