"""LoRA files as diffusers, PEFT, kohya's scripts and LyCORIS share them, read."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sbv2_jax.checkpoint.finite import is_finite
from sbv2_jax.convert.formats.finite import refuse_not_finite
from sbv2_jax.convert.formats.names import to_ours
from sbv2_jax.convert.formats.safetensors_io import TensorInfo, read_header
from sbv2_jax.convert.lora import settings as said
from sbv2_jax.convert.lora.kinds import LoCon, LoHa, LoKr, Lora, Product
from sbv2_jax.convert.lora.names import LOHA, LOKR, PEFT_PREFIX, Place, places
from sbv2_jax.convert.lora.source import PEFT_FILE, find_file, read_settings
from sbv2_jax.errors import InputError, listed

_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# An alpha is a number of any type: diffusers' own converter writes int64.
_NUMBERS = _FLOATS | {
    f"{kind[0].upper()}{bits}": kind + str(bits) for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
_ALPHA_IS_RANK = "rank"

# Of a layer: its tensors by their roles, as the file has them.
_Layer = dict[str, np.ndarray]


def modules_of(factors: Mapping[str, Any]) -> list[str]:
    """Returns the sorted names of the layers that factors are of."""
    return sorted({name.split(".lora.")[0] for name in factors})


def layers_of(params: Mapping[str, Any]) -> list[str]:
    """Returns the names of the layers of a network that a LoRA can change: those with kernels."""
    return [name.removesuffix(".kernel") for name in params if name.endswith(".kernel")]


def read_lora(source: str | Path, alpha: float | str | None = None, *, layers: Collection[str] = ()) -> Lora:
    """Reads a LoRA of the UNet alone, as `read_loras` does; raises InputError for one of the text encoder too."""
    loras = read_loras(source, alpha, {"unet": layers})
    if set(loras) != {"unet"}:
        raise InputError(f"{source} is not a LoRA of the UNet alone, but of {' and '.join(loras)}")
    return loras["unet"]


def read_loras(
    source: str | Path, alpha: float | str | None, layers: Mapping[str, Collection[str]]
) -> dict[str, Lora]:
    """Reads the LoRAs of a file, a folder or a hub id: of "unet", "text_encoder" and "text_encoder_2", one or more.

    `layers` are those of the networks, as `names.places` needs them. Each layer's strength, alpha / rank, is what
    the tensors, the metadata and, for a file of PEFT, the adapter_config.json beside it say. Where nothing is said
    alpha is the rank of each layer, as diffusers, kohya's scripts and the web UIs have it; only PEFT's own files
    mean nothing without their configuration. `alpha`, a number or "rank", is for layers of which nothing is said.
    Raises InputError, listing the tensors, for what is no LoRA or not a whole one, and for strengths that differ.
    """
    path = find_file(source)
    infos = read_header(path)
    found = places(infos, layers, str(path))
    networks = _read(path, infos, found)
    peft = path.name == PEFT_FILE or any(name.startswith(PEFT_PREFIX) for name in infos)
    settings = read_settings(path, peft)
    if "" in settings and len(networks) > 1:
        raise InputError(f"{path} is of several networks, and its adapter_config.json of one")
    alpha = _given(alpha)
    loras = {}
    for part, network in networks.items():
        paths = {place.layer: place.path for place in found.values() if place.part == part}
        several = [*settings.get(part, ()), *settings.get("", ())]
        loras[part] = _lora(path, network, paths, several, alpha, needed=peft)
    return loras


def _given(alpha: float | str | None) -> float | str | None:
    if alpha is None or alpha == _ALPHA_IS_RANK:
        return alpha
    try:
        value = float(alpha)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--alpha={alpha}: a finite number or the word {_ALPHA_IS_RANK} is expected")
    return value


def _read(
    path: Path, infos: Mapping[str, TensorInfo], found: Mapping[str, Place]
) -> dict[str, dict[str, _Layer]]:
    """Returns the tensors of each network and layer, by their roles."""
    networks: dict[str, dict[str, _Layer]] = {}
    wrong, twice = [], []
    for name, info in infos.items():
        place = found[name]
        types = _NUMBERS if place.role == "alpha" else _FLOATS
        if info.dtype not in types:
            wrong.append(f"{name} has type {info.dtype}")
            continue
        layer = networks.setdefault(place.part, {}).setdefault(place.layer, {})
        if place.role in layer:
            twice.append(name)
            continue
        count = math.prod(info.shape)
        data = np.fromfile(path, np.dtype(types[info.dtype]), count, offset=info.offset)
        layer[place.role] = data.reshape(info.shape).astype(np.float32)
    if wrong:
        raise InputError(f"{path} is not a LoRA of floats: {listed(wrong)}")
    if twice:
        raise InputError(f"{path} holds a layer's tensor in two spellings: {listed(twice)}")
    if not networks:
        raise InputError(f"{path} is not a whole LoRA: it is empty")
    return networks


def _lora(
    path: Path,
    network: Mapping[str, _Layer],
    paths: Mapping[str, str],
    settings: list[said.Settings],
    alpha: float | str | None,
    *,
    needed: bool,
) -> Lora:
    factors, products, magnitudes, ranks, wrong = {}, {}, {}, {}, []
    for layer, tensors in sorted(network.items()):
        rest = {role: tensor for role, tensor in tensors.items() if role not in _OTHER_ROLES}
        if set(rest) == {"down", "up"}:
            problem = _pair(tensors["down"], tensors["up"])
            ranks[layer] = tensors["down"].shape[0] if tensors["down"].ndim else None
            for part in () if problem else rest:
                name = f"{layer}.lora.{part}.kernel"
                factors[name] = to_ours(name, tensors[part])
        else:
            product = _product(rest)
            problem = _incomplete(rest) if product is None else None
            if product is not None:
                ranks[layer], products[layer] = product.rank, product
        magnitude, dora = _magnitude(tensors)
        problem = problem or dora or _number(tensors.get("alpha"))
        if magnitude is not None:
            magnitudes[layer] = magnitude
        if problem:
            wrong.append(f"{layer} {problem}")
    if wrong:
        raise InputError(f"{path} is not a whole LoRA: {listed(wrong)}")
    for one in settings:
        _require_kind(one, path, factors, products, magnitudes)
    broken = [layer for layer, tensors in network.items() if not all(map(is_finite, tensors.values()))]
    refuse_not_finite(broken, str(path))
    scales = _scales(path, network, paths, settings, alpha, ranks, needed=needed)
    return Lora(factors, scales, products, magnitudes)


_OTHER_ROLES = ("alpha", "dora_scale", "magnitude")


def _product(tensors: _Layer) -> Product | None:
    """Returns the update that tensors other than a plain pair make, or None."""
    roles = set(tensors)
    product: Product | None = None
    if roles == {"down", "mid", "up"}:
        product = LoCon(**tensors)
    elif roles == set(LOHA) or roles == set(LOHA[:4]):
        product = LoHa(**{role.removeprefix("hada_"): tensor for role, tensor in tensors.items()})
    elif roles and roles <= set(LOKR):
        product = LoKr(**{role.removeprefix("lokr_"): tensor for role, tensor in tensors.items()})
    whole = product is not None and product.fits() and product.rank != 0
    return product if whole else None


def _incomplete(tensors: _Layer) -> str:
    if set(tensors) <= {"down", "up"}:
        return "has only one of its two factors" if tensors else "has an alpha and no factors"
    return f"has {', '.join(f'{role} {tensor.shape}' for role, tensor in sorted(tensors.items()))}"


def _pair(down: np.ndarray, up: np.ndarray) -> str | None:
    if down.ndim != up.ndim or down.ndim not in (2, 4) or up.shape[2:] != (1,) * (up.ndim - 2):
        return f"has factors of shapes {down.shape} and {up.shape}"
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        return f"has factors of ranks {down.shape[0]} and {up.shape[1]}"
    return None


def _magnitude(tensors: _Layer) -> tuple[np.ndarray | None, str | None]:
    """Returns a layer's DoRA magnitudes as `Lora` has them, and what is wrong with them."""
    peft, lycoris = tensors.get("magnitude"), tensors.get("dora_scale")
    found = lycoris if peft is None else peft
    if found is None:
        return None, None
    if peft is not None and lycoris is None and peft.size and max(peft.shape, default=0) == peft.size:
        return peft.reshape(-1, 1), None
    if peft is None and found.ndim in (2, 4) and 1 in found.shape[:2] and found.shape[2:] in ((), (1, 1)):
        return found.reshape(found.shape[:2]), None
    return None, f"has DoRA's magnitudes of shape {found.shape}"


def _number(alpha: np.ndarray | None) -> str | None:
    if alpha is None:
        return None
    if alpha.size != 1:
        return f"has an alpha of shape {alpha.shape}, not one number"
    if not alpha.reshape(()):
        return "has an alpha of 0, which kohya's scripts take as the rank and others as no change"
    return None if np.isfinite(alpha) else "has no finite alpha"


def _require_kind(
    settings: said.Settings,
    path: Path,
    factors: Mapping,
    products: Mapping[str, Product],
    magnitudes: Mapping,
) -> None:
    """Raises InputError where the tensors are of another kind than is said of them."""
    kinds = {type(product).__name__.upper() for product in products.values()} | (
        {"LORA"} if factors else set()
    )
    if kinds != {settings.kind}:
        raise InputError(
            f"{settings.source} says {settings.kind}, and {path} holds {' and '.join(sorted(kinds))}"
        )
    if settings.dora != bool(magnitudes) or (magnitudes and len(magnitudes) < len(modules_of(factors))):
        raise InputError(
            f"{settings.source} says use_dora={settings.dora}, and {path} has magnitudes for {len(magnitudes)} of "
            f"{len(modules_of(factors))} layers"
        )


def _scales(
    path: Path,
    network: Mapping[str, _Layer],
    paths: Mapping[str, str],
    settings: list[said.Settings],
    alpha: float | str | None,
    ranks: Mapping[str, int | None],
    *,
    needed: bool,
) -> dict[str, float]:
    """Returns alpha / rank of every layer; see `read_loras`."""

    def scale(layer: str, value: float | str) -> float:
        # LoKr of two whole matrices has no rank, and LyCORIS no strength for it.
        rank = ranks[layer]
        return 1.0 if value == _ALPHA_IS_RANK or rank is None else float(value) / rank

    of_tensors = {
        layer: scale(layer, float(tensors["alpha"].reshape(())))
        for layer, tensors in network.items()
        if "alpha" in tensors
    }
    sources = [(one.source, said.scales(one, paths, ranks)) for one in settings]
    sources.append((f"the .alpha tensors of {path}", of_tensors))
    everywhere = {layer for _, scales in sources for layer in scales}
    missing = [layer for layer in network if layer not in everywhere]
    if alpha is not None:
        sources.append((f"--alpha={alpha}", {layer: scale(layer, alpha) for layer in network}))
    elif missing and (everywhere or needed):
        what = (
            f"of {len(missing)} layers ({listed(missing, ', ')})"
            if everywhere
            else "(no adapter_config.json)"
        )
        raise InputError(
            f"{path} does not say the alpha {what}: give it as --alpha=NUMBER, or --alpha=rank for that of each layer"
        )
    else:
        sources.append(("", dict.fromkeys(missing, 1.0)))
    found: dict[str, tuple[str, float]] = {}
    for source, scales in sources:
        differ = {}
        for layer, value in scales.items():
            first, other = found.setdefault(layer, (source, value))
            if not math.isclose(other, value, rel_tol=1e-3):  # an alpha may be float16
                differ[f"{layer} has {other:g} and {value:g}"] = first
        if differ:
            raise InputError(
                f"alpha / rank by {' and by '.join(sorted(set(differ.values())))} is not that by {source}, in "
                f"{len(differ)} layers: {listed(list(differ))}"
            )
    return {layer: value for layer, (_, value) in sorted(found.items())}
