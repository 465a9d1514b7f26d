"""The UNet of a pipeline, or one on its own: read for arithmetic on weights, and written back in place."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sbv2_jax.convert.component import Component, load_component, load_config, save_component
from sbv2_jax.convert.pipeline import component_dir, save_pipeline
from sbv2_jax.convert.resolve import resolve
from sbv2_jax.tree import require_same


def load_unet(model: str | Path) -> Component:
    """Reads the UNet of a pipeline or a UNet's own directory, in its file's types and as views of the file.

    Raises InputError as `resolve`, `component_dir` and `load_component` do.
    """
    return load_component(component_dir(resolve(model), "unet"))


def require_alike(model: Component, other: Component, model_name: str, other_name: str) -> None:
    """Raises InputError, listing every leaf, where two UNets are not of the same shapes."""
    require_same(other.params, model.params, other_name, model_name)


def save_like(out: str | Path, model: str | Path, params: Mapping[str, np.ndarray]) -> None:
    """Writes `model` with other weights of its UNet: a pipeline with all its parts, or a UNet on its own.

    Raises InputError as `save_pipeline` and `save_component` do; nothing is written then.
    """
    directory = resolve(model)
    config = load_config(component_dir(directory, "unet"))
    if (directory / "model_index.json").exists():
        save_pipeline(out, base=directory, unet=Component(config, dict(params)))
    else:
        save_component(out, config, params)
