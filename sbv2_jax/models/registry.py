"""Which configuration and which network a `config.json` names."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from sbv2_jax.errors import InputError
from sbv2_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from sbv2_jax.models.config import ModelConfig, TransformersConfig
from sbv2_jax.models.dinov2 import Dinov2Config, Dinov2Model
from sbv2_jax.models.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from sbv2_jax.models.inception import InceptionConfig, InceptionV3
from sbv2_jax.models.network import Network
from sbv2_jax.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from sbv2_jax.models.unet import PLAIN, Execution, UNet2DConditionModel, UNetConfig
from sbv2_jax.models.vae import AutoencoderKL, VAEConfig

_CLASSES: dict[str, tuple[type[ModelConfig], Callable[..., nnx.Module]]] = {
    "UNet2DConditionModel": (UNetConfig, UNet2DConditionModel),
    "AutoencoderKL": (VAEConfig, AutoencoderKL),
    "AutoencoderTiny": (TinyVAEConfig, AutoencoderTiny),
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextConfig, CLIPTextModelWithProjection),
    "CLIPModel": (CLIPConfig, CLIPModel),
    "Dinov2Model": (Dinov2Config, Dinov2Model),
    "InceptionV3": (InceptionConfig, InceptionV3),
    "EfficientNetLite": (EfficientNetLiteConfig, EfficientNetLite),
}
# What transformers builds from a file that does not say its `architectures`.
_MODEL_TYPES = {"clip_text_model": "CLIPTextModel", "clip": "CLIPModel", "dinov2": "Dinov2Model"}


def class_name(values: Mapping[str, Any], source: str = "config.json") -> str:
    """Returns the class that a file's values name: `_class_name` of diffusers, `architectures` of transformers.

    A transformers file without `architectures` goes by its `model_type`.
    Raises InputError that names the source where the class is missing or not supported.
    """
    if "_class_name" in values:
        found = values["_class_name"]
    elif values.get("architectures") is not None:
        found = values["architectures"]
        found = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
    else:
        found = _MODEL_TYPES.get(str(values.get("model_type")))
        if found is None:
            raise InputError(f"{source} names no supported class (model_type={values.get('model_type')!r})")
    if not isinstance(found, str) or found not in _CLASSES:
        raise InputError(f"{source}: class {found!r} is not supported (one of {', '.join(_CLASSES)})")
    return found


def config_class(class_name: str) -> type[ModelConfig]:
    """Returns the configuration of a class; raises InputError for a class that is not supported."""
    if class_name not in _CLASSES:
        raise InputError(f"class {class_name!r} is not supported (one of {', '.join(_CLASSES)})")
    return _CLASSES[class_name][0]


def class_of(config: ModelConfig) -> str:
    """Returns the class that a configuration describes.

    Raises InputError where the `architectures` of a CLIP configuration do not fit it.
    """
    if not isinstance(config, TransformersConfig):
        return config.CLASS_NAME
    found = class_name({"architectures": config.architectures, "model_type": config.FIXED["model_type"][0]})
    if not isinstance(config, _CLASSES[found][0]):
        raise InputError(f"architectures={config.architectures!r} do not fit a {type(config).__name__}")
    return found


def build(config: ModelConfig, rngs: nnx.Rngs, *, execution: Execution = PLAIN) -> nnx.Module:
    """Builds the module of a configuration, for `Network`; `execution` is the UNet's alone."""
    name = class_of(config)
    options = {"execution": execution} if name == "UNet2DConditionModel" else {}
    return _CLASSES[name][1](config, rngs, **options)


@functools.cache
def network(config: ModelConfig, *, execution: Execution = PLAIN) -> Network:
    """Returns the network of a configuration, without parameters; `execution` as in `build`.

    Kept: a network has no state, and tracing its shapes takes a second at the size of Stable Diffusion.
    """
    return Network(lambda rngs: build(config, rngs, execution=execution))
