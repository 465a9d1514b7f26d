"""LoRA files written: for diffusers and PEFT, or in kohya's names, which the web UIs read."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sbv2_jax.convert.formats.files import new_file
from sbv2_jax.convert.formats.names import to_torch
from sbv2_jax.convert.lora.files import modules_of
from sbv2_jax.convert.lora.kohya import file_name
from sbv2_jax.convert.lora.source import METADATA

FORMATS = ("diffusers", "kohya")
_PREFIX = "unet."
_DIFFUSERS_FACTORS = {"down": "lora_A", "up": "lora_B"}
_KOHYA_FACTORS = {"down": "lora_down", "up": "lora_up"}


def save_lora(
    path: str | Path, factors: Mapping[str, np.ndarray], alpha: float, *, file_format: str = "diffusers"
) -> None:
    """Writes a UNet's LoRA of one rank as a file, in float32, with alpha = rank.

    alpha / rank is multiplied into the factors `up`, so that a reader that looks for no alpha draws the same. The
    names are diffusers' and PEFT's, `unet.<layer>.lora_A.weight` [r, in] and `lora_B.weight` [out, r], with what
    `peft.LoraConfig` takes in the metadata; or kohya's, `lora_unet_<layer, underscores for dots>.lora_down.weight`,
    `.lora_up.weight` and `.alpha`, for ComfyUI, A1111 and Forge.
    Raises InputError where the file exists or cannot be written.
    """
    modules = modules_of(factors)
    ranks = {factors[f"{module}.lora.down.kernel"].shape[-1] for module in modules}
    if len(ranks) != 1:
        raise ValueError(f"a LoRA file of one rank is written, not of {sorted(ranks)}")
    (rank,) = ranks
    tensors, metadata = {}, None
    for module in modules:
        down, up = (
            to_torch(name, np.asarray(factors[name], np.float32))
            for name in (f"{module}.lora.{part}.kernel" for part in ("down", "up"))
        )
        up = np.float32(alpha / rank) * up
        if file_format == "kohya":
            prefix, names = file_name(module), _KOHYA_FACTORS
            tensors[f"{prefix}.alpha"] = np.asarray(rank, np.float32)
        else:
            prefix, names = f"{_PREFIX}{module}", _DIFFUSERS_FACTORS
        tensors[f"{prefix}.{names['down']}.weight"] = np.ascontiguousarray(down)
        tensors[f"{prefix}.{names['up']}.weight"] = np.ascontiguousarray(up)
    if file_format == "diffusers":
        settings = {"r": rank, "lora_alpha": rank, "target_modules": modules}
        named = {f"{_PREFIX}{name}": value for name, value in settings.items()}
        # One entry only: the library writes several in random order, and the bytes would differ.
        metadata = {METADATA: json.dumps(named, sort_keys=True)}
    with new_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
