"""LoRA files as diffusers and PEFT share them: written with alpha, read in both spellings and in kohya's."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sbv2_jax.convert.files import new_file, parse_json
from sbv2_jax.convert.kohya import diffusers_names
from sbv2_jax.convert.names import to_ours, to_torch
from sbv2_jax.convert.safetensors_io import DTYPES, read_header, read_tensors
from sbv2_jax.errors import InputError

# Without it diffusers takes alpha = rank, and the update comes back weaker or stronger than it was.
_METADATA = "lora_adapter_metadata"
_PREFIX = "unet."
_FACTORS = {"lora_A": "down", "lora_B": "up", "lora.down": "down", "lora.up": "up"}
_TENSOR = re.compile(
    rf"(?:base_model\.model\.)?(?:{re.escape(_PREFIX)})?(?P<module>\w[\w.]*?)\."
    r"(?:(?P<factor>lora_A|lora_B|lora\.down|lora\.up)\.weight|(?P<alpha>alpha))"
)
# Variants of LoRA whose update is not alpha / rank * B A.
_UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias")


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """A UNet's LoRA: `<module>.lora.down.kernel` [in, r], `<module>.lora.up.kernel` [r, out], alpha by module.

    Those of a convolution are [h, w, in, r] and [1, 1, r, out].
    """

    factors: Mapping[str, np.ndarray]
    alphas: Mapping[str, float]

    @property
    def scales(self) -> dict[str, float]:
        """alpha / rank of every module."""
        return {
            module: alpha / self.factors[f"{module}.lora.down.kernel"].shape[-1]
            for module, alpha in self.alphas.items()
        }


def modules_of(factors: Mapping[str, Any]) -> list[str]:
    """Returns the sorted names of the layers that a LoRA changes."""
    return sorted({name.split(".lora.")[0] for name in factors})


def save_lora(path: str | Path, factors: Mapping[str, np.ndarray], alpha: float) -> None:
    """Writes a UNet's LoRA of one rank as a file for `pipe.load_lora_weights` and PEFT, in float32.

    The names are `unet.<module>.lora_A.weight` [r, in] and `lora_B.weight` [out, r]; the metadata hold what
    `peft.LoraConfig` takes. Raises InputError where the file exists or cannot be written.
    """
    modules = modules_of(factors)
    ranks = {factors[f"{module}.lora.down.kernel"].shape[-1] for module in modules}
    if len(ranks) != 1:
        raise ValueError(f"a LoRA file of one rank is written, not of {sorted(ranks)}")
    settings = {
        "r": ranks.pop(),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "target_modules": modules,
    }
    tensors = {}
    for module in modules:
        for theirs, part in (("lora_A", "down"), ("lora_B", "up")):
            name = f"{module}.lora.{part}.kernel"
            tensor = to_torch(name, np.asarray(factors[name], np.float32))
            tensors[f"{_PREFIX}{module}.{theirs}.weight"] = np.ascontiguousarray(tensor)
    text = json.dumps({f"{_PREFIX}{name}": value for name, value in settings.items()}, sort_keys=True)
    with new_file(path) as partial:
        # One entry only: the library writes several in random order, and the bytes would differ.
        save_file(tensors, partial, metadata={_METADATA: text})


def read_lora(path: str | Path, alpha: float | None = None, *, layers: Collection[str] = ()) -> Lora:
    """Reads a UNet's LoRA from a safetensors file, spelled `lora_A`/`lora_B`, `lora.down`/`lora.up` or by kohya.

    `layers` are the paths of the network's layers, which kohya's names cannot be read without. Alpha comes from
    the file's metadata or its `.alpha` tensors; for a file that has neither it must be given.
    Raises InputError that lists the tensors that are none of a UNet's LoRA, lack their other half or have
    another rank than the metadata say, and for variants of LoRA (DoRA, rank-stabilised, with biases).
    """
    path = Path(path)
    factors, alphas = _read_tensors(path, layers)
    ranks = {module: factors[f"{module}.lora.down.kernel"].shape[-1] for module in modules_of(factors)}
    settings = _read_settings(path)
    if settings and alphas:
        raise InputError(f"{path} says alpha twice: in its metadata and in .alpha tensors")
    if settings:
        alphas = {module: _setting(path, settings, "lora_alpha", "alpha", module) for module in ranks}
        said = {module: _setting(path, settings, "r", "rank", module) for module in ranks}
        wrong = [
            f"{module} has {rank}, not {said[module]:g}"
            for module, rank in ranks.items()
            if rank != said[module]
        ]
        if wrong:
            raise InputError(f"{path} has other ranks than its metadata say: {'; '.join(wrong)}")
    if alphas and alpha is not None:
        raise InputError(f"{path} says its alpha itself; do not give --alpha")
    if alpha is not None:
        alphas = dict.fromkeys(ranks, alpha)
    if not alphas:
        raise InputError(
            f"{path} does not say its alpha: `convert.py fuse` takes --alpha (not recorded, it is often the rank, "
            f"here {', '.join(map(str, sorted(set(ranks.values()))))})"
        )
    if wrong := [module for module in ranks if not math.isfinite(alphas.get(module, math.nan))]:
        raise InputError(f"{path} has no finite alpha for {', '.join(wrong)}")
    return Lora(factors, {module: float(alphas[module]) for module in ranks})


def _read_tensors(path: Path, layers: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    infos = read_header(path)
    today = diffusers_names(infos, layers, str(path))
    wrong, names, alpha_names = [], {}, {}
    for name, info in infos.items():
        match = _TENSOR.fullmatch(today[name])
        if match is None or len(info.shape) not in ({0, 1} if match["alpha"] else {2, 4}):
            wrong.append(f"{name} {info.shape}")
        elif info.dtype not in DTYPES:
            wrong.append(f"{name} has type {info.dtype}")
        elif match["alpha"]:
            alpha_names[name] = match["module"]
        else:
            names[name] = f"{match['module']}.lora.{_FACTORS[match['factor']]}.kernel"
    if wrong:
        raise InputError(
            f"{path} is not a UNet's LoRA in the names of diffusers, PEFT or kohya, in {len(wrong)} tensors: "
            f"{'; '.join(wrong)}"
        )
    factors, alphas = {}, {}
    for name, array in read_tensors(path, infos, mapped=False):
        if name in alpha_names:
            if array.size != 1:
                raise InputError(f"{path}: {name} is not one number")
            alphas[alpha_names[name]] = float(array.reshape(()))
        elif names[name] in factors:
            raise InputError(f"{path} holds {names[name]} in two spellings")
        else:
            factors[names[name]] = to_ours(names[name], array.astype(np.float32))
    _require_pairs(path, factors, alphas)
    return factors, alphas


def _require_pairs(path: Path, factors: Mapping[str, np.ndarray], alphas: Mapping[str, float]) -> None:
    modules = modules_of(factors)
    wrong = []
    for module in modules:
        down, up = (factors.get(f"{module}.lora.{part}.kernel") for part in ("down", "up"))
        if down is None or up is None:
            wrong.append(f"{module} has only one of its two factors")
        elif down.ndim != up.ndim or up.shape[:-2] != (1,) * (up.ndim - 2):
            wrong.append(f"{module} has factors of shapes {down.shape} and {up.shape}")
        elif down.shape[-1] != up.shape[-2] or not down.shape[-1]:
            wrong.append(f"{module} has factors of ranks {down.shape[-1]} and {up.shape[-2]}")
    wrong += [f"{module} has an alpha and no factors" for module in alphas if module not in modules]
    if wrong or not modules:
        raise InputError(f"{path} is not a whole LoRA: {'; '.join(wrong) or 'it is empty'}")


def _read_settings(path: Path) -> dict[str, Any]:
    """Returns what the metadata say of the UNet's LoRA, by the names of `peft.LoraConfig`; {} for nothing."""
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    values = parse_json(text.encode(), f"the {_METADATA} of {path}")
    settings = {name.removeprefix(_PREFIX): value for name, value in values.items()}
    if variants := [name for name in _UNSUPPORTED if settings.get(name)]:
        raise InputError(f"{path} is a LoRA with {', '.join(variants)}, which is not supported")
    return settings


def _setting(path: Path, settings: Mapping[str, Any], name: str, kind: str, module: str) -> float:
    """Returns alpha or the rank of one layer; a pattern is the end of a layer's path, as PEFT means it."""
    value = settings.get(name)
    patterns = settings.get(f"{kind}_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {kind}_pattern in its metadata is {patterns!r}")
    for pattern, special in patterns.items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise InputError(f"{path}: {kind}_pattern {pattern!r} in its metadata is not supported")
        end = pattern.removeprefix("^")
        if module == end or (end == pattern and module.endswith(f".{end}")):
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: {name} in its metadata is {value!r}")
    return float(value)
