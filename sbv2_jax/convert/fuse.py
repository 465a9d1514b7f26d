"""LoRAs added to the weights of a UNet, in float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax import lora
from sbv2_jax.convert.lora_files import Lora, modules_of, read_lora
from sbv2_jax.convert.unets import Model, save_model
from sbv2_jax.errors import InputError


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


def fuse_file(model: Model, file: str | Path, out: str | Path, alpha: float | None = None) -> None:
    """Writes a model with the LoRA of a file fused into its UNet's weights.

    Raises InputError as `read_lora`, `require_fit` and `save_model` do; nothing is written then.
    """
    params = model.unet.params
    layers = [name.removesuffix(".kernel") for name in params if name.endswith(".kernel")]
    update = read_lora(file, alpha, layers=layers)
    require_fit(update.factors, params, model.name)
    save_model(out, model, fuse(params, update))
