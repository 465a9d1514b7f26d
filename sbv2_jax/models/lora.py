"""LoRA: attached to dense layers by a regular expression, kept apart from the base, merged in float32.

A network built with `attach` takes the base parameters and the LoRA's in one dictionary, `{**base, **lora}`,
so teacher and score model, or any number of LoRAs, share one base array tree.
"""

import re
import zlib
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sbv2_jax.errors import InputError
from sbv2_jax.models.layers import Linear, LoRA
from sbv2_jax.tree import Arrays, Params, Shapes

T = TypeVar("T")

_INFIX = ".lora."


def attach(model: nnx.Module, targets: str, rank: int, rngs: nnx.Rngs) -> nnx.Module:
    """Gives a LoRA of this rank to every dense layer whose path the regular expression matches in full.

    Returns the model, changed in place. Raises InputError where nothing matches, or a convolution does.
    """
    pattern = re.compile(targets)
    modules = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    matched = [(path, module) for path, module in modules if pattern.fullmatch(path)]
    if convolutions := [path for path, module in matched if isinstance(module, nnx.Conv)]:
        raise InputError(
            f"LoRA targets {targets!r} match convolutions, only dense layers can: {convolutions}"
        )
    layers = [module for _, module in matched if isinstance(module, Linear)]
    if not layers:
        raise InputError(f"LoRA targets {targets!r} match no dense layer of {type(model).__name__}")
    for layer in layers:
        layer.lora = LoRA(layer.in_features, layer.out_features, rank, rngs)
    return model


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA's factor."""
    return _INFIX in name


def base_and_factors(params: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Returns the parameters of the base and, apart from them, the factors of its LoRA."""
    base = {name: leaf for name, leaf in params.items() if not is_lora(name)}
    return base, {name: leaf for name, leaf in params.items() if is_lora(name)}


def fresh_factors(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Returns the factors that the LoRA in these abstract parameters starts from, float32 on the host.

    `down` is U(-1, 1) / sqrt(features in), which is Kaiming's uniform of a = sqrt 5, and `up` zero, as in PEFT
    (`LoraLayer.reset_lora_parameters`). Each factor is drawn from the seed and its own name alone: nothing else is.
    """

    def factor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(".up.kernel"):
            return np.zeros(shape, np.float32)
        unit = np.random.default_rng((seed, zlib.crc32(name.encode()))).random(shape, np.float32)
        return (2.0 * unit - 1.0) * np.float32(shape[0] ** -0.5)

    return {name: factor(name, shape.shape) for name, shape in shapes.items() if is_lora(name)}


def merge(base: Params, lora: Arrays, scale: float) -> Params:
    """Returns the base with `scale * down @ up` added to each kernel, in float32, in the base's dtypes.

    `scale` is alpha / rank. In bfloat16 most entries would not move for a small update.
    Raises InputError that lists the LoRA's modules that the base lacks.
    """
    modules = sorted({name.split(_INFIX)[0] for name in lora})
    if missing := [module for module in modules if f"{module}.kernel" not in base]:
        raise InputError(f"the LoRA has modules that the base lacks: {missing}")
    merged = dict(base)
    for module in modules:
        kernel = base[f"{module}.kernel"]
        down, up = (lora[f"{module}{_INFIX}{part}.kernel"].astype(jnp.float32) for part in ("down", "up"))
        merged[f"{module}.kernel"] = (kernel.astype(jnp.float32) + update(down, up, scale)).astype(
            kernel.dtype
        )
    return merged


def update(down: jax.Array | np.ndarray, up: jax.Array | np.ndarray, scale: float) -> jax.Array:
    """Returns what a LoRA adds to a kernel, `scale * down @ up`, in full precision."""
    return scale * jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
