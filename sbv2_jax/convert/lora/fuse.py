"""LoRAs added to the weights of a UNet and of its text encoders, in float32."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.convert.formats.component import Component, load_component
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.lora.files import Lora, modules_of, read_loras
from sbv2_jax.convert.model import Model, save_model
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.models.registry import network


def require_fit(factors: Mapping[str, Any], base: Mapping[str, Any], base_name: str) -> None:
    """Raises InputError that lists the layers of a LoRA that the base lacks or has in another shape."""
    wrong = []
    for module in modules_of(factors):
        kernel = base.get(f"{module}.kernel")
        down, up = (factors[f"{module}.lora.{part}.kernel"] for part in ("down", "up"))
        shape = (*down.shape[:-1], up.shape[-1])
        if kernel is None:
            wrong.append(f"{module} is not there")
        elif kernel.shape != shape:
            wrong.append(f"{module} is {kernel.shape}, the LoRA's is {shape}")
    if wrong:
        raise InputError(f"the LoRA does not fit {base_name} in {len(wrong)} layers: {'; '.join(wrong)}")


def fuse(base: Mapping[str, np.ndarray], update: Lora) -> dict[str, np.ndarray]:
    """Returns the base with the LoRA added, in float32, in the base's types; raises InputError as `require_fit`."""
    require_fit(update.factors, base, "the base")
    fused, scales = dict(base), update.scales
    for scale in sorted(set(scales.values())):
        chosen = {
            name: leaf for name, leaf in update.factors.items() if scales[name.split(".lora.")[0]] == scale
        }
        fused = lora.merge(fused, chosen, scale)
    return {name: np.asarray(leaf) for name, leaf in fused.items()}


def fuse_file(
    model: Model,
    file: str | Path,
    out: str | Path,
    alpha: float | None = None,
    *,
    dtype: Any | None = None,
) -> None:
    """Writes a model with the LoRA of a file fused into the weights of its UNet and of its text encoders.

    `dtype` is explained at `save_model`.

    Raises InputError as `read_loras`, `require_fit` and `save_model` do, and for a LoRA of a text encoder where
    the model is a UNet on its own; nothing is written then.
    """
    layers = {"unet": _layers(model.unet.params)}
    towers = {}
    if model.pipeline is not None:
        opened = load_pipeline(model.pipeline)
        towers = {name: opened.component_dir(name) for name in opened.text_encoders}
        layers |= {name: _layers(network(opened.configs[name]).shapes) for name in towers}
    updates = read_loras(file, alpha, layers)
    if missing := [part for part in updates if part not in layers]:
        kind = "has none" if towers else "is a UNet on its own"
        raise InputError(f"{file} is for a {' and a '.join(missing)} too, and {model.name} {kind}")
    fused = {}
    for part, update in updates.items():
        component = model.unet if part == "unet" else load_component(towers[part])
        require_fit(update.factors, component.params, f"the {part} of {model.name}")
        fused[part] = Component(component.config, fuse(component.params, update))
    unet = fused.pop("unet", model.unet)
    save_model(out, dataclasses.replace(model, unet=unet, text_encoders=fused), dtype=dtype)


def _layers(params: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".kernel") for name in params if name.endswith(".kernel")]
