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

from sbv2_jax.convert.formats.files import new_file, parse_json
from sbv2_jax.convert.formats.finite import is_finite, refuse_not_finite
from sbv2_jax.convert.formats.names import to_ours, to_torch
from sbv2_jax.convert.formats.safetensors_io import DTYPES, read_header, read_tensors
from sbv2_jax.convert.lora.kohya import diffusers_names
from sbv2_jax.errors import InputError
from sbv2_jax.models.clip import tensors_of_file

# Without it diffusers takes alpha = rank, and the update comes back weaker or stronger than it was.
_METADATA = "lora_adapter_metadata"
_PREFIX = "unet."
_FACTORS = {"lora_A": "down", "lora_B": "up", "lora.down": "down", "lora.up": "up"}
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?:(?P<part>unet|text_encoder|text_encoder_2)\.)?(?P<module>\w[\w.]*?)\."
    r"(?:(?P<factor>lora_A|lora_B|lora\.down|lora\.up)\.weight|(?P<alpha>alpha))"
)
# Variants of LoRA whose update is not alpha / rank * B A.
_UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias")


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """A network's LoRA: `<module>.lora.down.kernel` [in, r], `<module>.lora.up.kernel` [r, out], alpha by module.

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
    """Reads a LoRA of the UNet alone, as `read_loras` does; raises InputError for one of the text encoder too."""
    loras = read_loras(path, alpha, {"unet": layers})
    if set(loras) != {"unet"}:
        raise InputError(f"{path} is not a LoRA of the UNet alone, but of {' and '.join(loras)}")
    return loras["unet"]


def read_loras(
    path: str | Path, alpha: float | None, layers: Mapping[str, Collection[str]]
) -> dict[str, Lora]:
    """Reads the LoRAs of a safetensors file, of "unet", "text_encoder" and "text_encoder_2", of one or more.

    They are spelled `lora_A`/`lora_B`, `lora.down`/`lora.up`, or by kohya, whose names cannot be read without the
    paths of the networks' `layers`. Alpha comes from the file's metadata or its `.alpha` tensors; for a LoRA that
    has neither it must be given.
    Raises InputError that lists the tensors that are none of a LoRA, lack their other half or have another rank
    than the metadata say, and for variants of LoRA (DoRA, rank-stabilised, with biases).
    """
    path = Path(path)
    tensors, settings = _read_tensors(path, layers), _read_settings(path)
    said = {part: _said(path, *found, settings.get(part, {})) for part, found in tensors.items()}
    if alpha is not None and all(said.values()):
        raise InputError(f"{path} says its alpha itself; do not give --alpha")
    loras = {}
    for part, (factors, _) in tensors.items():
        ranks = _ranks(factors)
        alphas = said[part] or dict.fromkeys(ranks if alpha is not None else (), alpha)
        if not alphas:
            raise InputError(
                f"{path} does not say its alpha: `convert.py fuse` takes --alpha (not recorded, it is often the "
                f"rank, here {', '.join(map(str, sorted(set(ranks.values()))))})"
            )
        if wrong := [module for module in ranks if not math.isfinite(alphas.get(module, math.nan))]:
            raise InputError(f"{path} has no finite alpha for {', '.join(wrong)}")
        loras[part] = Lora(factors, {module: float(alphas[module]) for module in ranks})
    return loras


def _ranks(factors: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {module: factors[f"{module}.lora.down.kernel"].shape[-1] for module in modules_of(factors)}


def _said(
    path: Path, factors: Mapping[str, np.ndarray], alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> Mapping[str, float]:
    """Returns the alphas that a file gives one of its LoRAs, none of them, or all that it has."""
    if not settings:
        return alphas
    if alphas:
        raise InputError(f"{path} says alpha twice: in its metadata and in .alpha tensors")
    ranks = _ranks(factors)
    wanted = {module: _setting(path, settings, "r", "rank", module) for module in ranks}
    wrong = [
        f"{name} has {rank}, not {wanted[name]:g}" for name, rank in ranks.items() if rank != wanted[name]
    ]
    if wrong:
        raise InputError(f"{path} has other ranks than its metadata say: {'; '.join(wrong)}")
    return {module: _setting(path, settings, "lora_alpha", "alpha", module) for module in ranks}


def _read_tensors(
    path: Path, layers: Mapping[str, Collection[str]]
) -> dict[str, tuple[dict[str, np.ndarray], dict[str, float]]]:
    """Returns the factors and the alphas that are tensors, by the network."""
    infos = read_header(path)
    today = diffusers_names(infos, layers, str(path))
    wrong, places = [], {}
    for name, info in infos.items():
        match = _TENSOR.fullmatch(today[name])
        if match is None or len(info.shape) not in ({0, 1} if match["alpha"] else {2, 4}):
            wrong.append(f"{name} {info.shape}")
        elif info.dtype not in DTYPES:
            wrong.append(f"{name} has type {info.dtype}")
        else:
            places[name] = _place(match)
    if wrong:
        raise InputError(
            f"{path} is not a LoRA in the names of diffusers, PEFT or kohya, in {len(wrong)} tensors: "
            f"{'; '.join(wrong)}"
        )
    found: dict[str, tuple[dict[str, np.ndarray], dict[str, float]]] = {}
    for name, array in read_tensors(path, infos, mapped=False):
        part, module, factor = places[name]
        factors, alphas = found.setdefault(part, ({}, {}))
        if factor is None:
            if array.size != 1:
                raise InputError(f"{path}: {name} is not one number")
            alphas[module] = float(array.reshape(()))
            continue
        ours = f"{module}.lora.{factor}.kernel"
        if ours in factors:
            raise InputError(f"{path} holds {ours} in two spellings")
        factors[ours] = to_ours(ours, array.astype(np.float32))
    if not found:
        raise InputError(f"{path} is not a whole LoRA: it is empty")
    for factors, alphas in found.values():
        _require_pairs(path, factors, alphas)
        refuse_not_finite([name for name in factors if not is_finite(factors[name])], str(path))
    return found


def _place(match: re.Match) -> tuple[str, str, str | None]:
    """Returns a tensor's network, its layer, and which factor it is: None for alpha."""
    part, module = match["part"] or "unet", match["module"]
    if part != "unet":
        (module,) = tensors_of_file({module: None})  # older files begin with text_model, today's do not
    return part, module, None if match["alpha"] else _FACTORS[match["factor"]]


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
    if wrong:
        raise InputError(f"{path} is not a whole LoRA: {'; '.join(wrong)}")


def _read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what the metadata say of each network's LoRA, by the names of `peft.LoraConfig`."""
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_METADATA)
    settings: dict[str, dict[str, Any]] = {}
    values = {} if text is None else parse_json(text.encode(), f"the {_METADATA} of {path}")
    for name, value in values.items():
        part, dot, setting = name.partition(".")
        settings.setdefault(part if dot else "unet", {})[setting if dot else name] = value
        if value and (setting or name) in _UNSUPPORTED:
            raise InputError(f"{path} is a LoRA with {setting or name}, which is not supported")
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
