"""A UNet and the pipeline around it: opened for arithmetic on weights, and written back in place."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.convert.formats.component import Component, load_component, save_component
from sbv2_jax.convert.formats.pipeline import component_dir, load_pipeline, save_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.models.config import of_kind
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.tree import require_same


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A UNet, under the name that messages give it.

    `pipeline` is the directory of the parts around it and `scheduler` the values of its scheduler_config.json;
    both are None for a UNet on its own. `text_encoders` stand in for those of the pipeline's that were changed.
    """

    name: str
    unet: Component[UNetConfig]
    pipeline: Path | None = None
    scheduler: Mapping[str, Any] | None = None
    text_encoders: Mapping[str, Component] = dataclasses.field(default_factory=dict)


def open_model(model: str | Path) -> Model:
    """Opens a pipeline, or a UNet on its own; the weights keep their types.

    Raises InputError as `resolve`, `load_component` and `load_pipeline` do.
    """
    directory = resolve(model)
    folder = component_dir(directory, "unet")
    loaded = load_component(folder)
    unet = Component(of_kind(loaded.config, UNetConfig, str(folder)), loaded.params)
    if not (directory / "model_index.json").exists():
        return Model(str(model), unet)
    return Model(str(model), unet, directory, load_pipeline(directory).scheduler)


def require_alike(model: Model, other: Model) -> None:
    """Raises InputError, listing every leaf, where two UNets are not of the same shapes."""
    require_same(other.unet.params, model.unet.params, other.name, model.name)


def save_model(
    out: str | Path,
    model: Model,
    params: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: Any | None = None,
) -> None:
    """Writes a model, with other weights of its UNet if they are given, as a diffusers directory.

    Without a `dtype` a pipeline is written in float32, and a UNet on its own keeps its types.

    Raises InputError as `save_pipeline` and `save_component` do; nothing is written then.
    """
    unet = model.unet if params is None else Component(model.unet.config, dict(params))
    if model.pipeline is None:
        save_component(out, unet.config, unet.params, dtype=dtype)
    else:
        save_pipeline(
            out,
            base=model.pipeline,
            unet=unet,
            scheduler=model.scheduler,
            dtype=dtype or "float32",
            **model.text_encoders,
        )
