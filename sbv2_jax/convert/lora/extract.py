"""The LoRA that comes nearest to the difference of two UNets."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sbv2_jax.convert.lora.write import save_lora
from sbv2_jax.convert.model import Model, require_alike
from sbv2_jax.errors import InputError


class Extracted(NamedTuple):
    """Factors of one rank, with alpha = rank, and what they leave out.

    `kept` is the share of the dense layers' squared difference that the factors hold; `left_out` names the
    leaves that differ and are no dense layer's kernel.
    """

    factors: dict[str, np.ndarray]
    rank: int
    kept: float
    left_out: list[str]


def extract(model: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], rank: int) -> Extracted:
    """Returns the best approximation of `model - base` by a LoRA of this rank, layer by layer.

    A rank that no layer can have is lowered to the largest that one can. Raises InputError where no dense
    layer differs. Source: truncated singular value decomposition (Eckart and Young, 1936).
    """
    deltas, left_out = {}, []
    for name, leaf in model.items():
        delta = leaf.astype(np.float32) - base[name].astype(np.float32)
        if not delta.any():
            continue
        if name.endswith(".kernel") and delta.ndim == 2:
            deltas[name.removesuffix(".kernel")] = delta
        else:
            left_out.append(name)
    if not deltas:
        raise InputError(f"no dense layer differs; {len(left_out)} other leaves do")
    rank = min(rank, max(min(delta.shape) for delta in deltas.values()))
    factors, total, kept = {}, 0.0, 0.0
    for module, delta in deltas.items():
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        total, kept = total + float((values**2).sum()), kept + float((values[:rank] ** 2).sum())
        root = np.sqrt(values[:rank])
        # A smaller layer than the rank gets zeros: one rank and one alpha for the whole file.
        pad = rank - len(root)
        factors[f"{module}.lora.down.kernel"] = np.pad(left[:, :rank] * root, ((0, 0), (0, pad)))
        factors[f"{module}.lora.up.kernel"] = np.pad(root[:, None] * right[:rank], ((0, pad), (0, 0)))
    return Extracted(factors, rank, kept / total, left_out)


def extract_file(
    model: Model, base: Model, rank: int, out: str | Path, *, file_format: str = "diffusers"
) -> Extracted:
    """Writes the LoRA that turns the UNet of `base` into nearly that of `model`; returns what it holds.

    `file_format` is explained at `save_lora`.

    Raises InputError as `extract` and `save_lora` do, and, with the list, for UNets of other shapes.
    """
    if rank < 1:
        raise InputError(f"the rank of a LoRA is at least 1, not {rank}")
    require_alike(base, model)
    extracted = extract(model.unet.params, base.unet.params, rank)
    save_lora(out, extracted.factors, extracted.rank, file_format=file_format)
    return extracted


def summary(extracted: Extracted) -> str:
    """Returns what to tell of an extraction: how much it holds, and every leaf that it could not take up."""
    layers = len(extracted.factors) // 2
    lines = [
        f"rank {extracted.rank} in {layers} layers holds {extracted.kept:.2%} of their squared difference"
    ]
    if extracted.left_out:
        lines.append(f"left out, though they differ, {len(extracted.left_out)} leaves of other kinds:")
    return "\n".join([*lines, *extracted.left_out])
