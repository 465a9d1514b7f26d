"""LoRAs added to the weights of a UNet and of its text encoders, in float32."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.convert.formats.component import Component, load_component
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.lora.files import layers_of, read_loras
from sbv2_jax.convert.lora.kinds import Lora, torch_shape
from sbv2_jax.convert.lora.names import family
from sbv2_jax.convert.lora.source import Request, parse_request
from sbv2_jax.convert.model import Model, save_model
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.registry import network


def require_fit(lora: Lora, base: Mapping[str, Any], base_name: str) -> None:
    """Raises InputError that lists the layers of a LoRA that the base lacks or has in another shape.

    Where the shapes are those of another family of models, it says which.
    """
    wrong = []
    for layer in lora.layers:
        kernel, update = base.get(f"{layer}.kernel"), lora.shape(layer)
        if kernel is None:
            wrong.append(f"{layer} is not there")
        elif not lora.fits(layer, kernel.shape):
            wrong.append(f"{layer} is {torch_shape(kernel.shape)}, the LoRA's is {update}")
        elif (magnitude := lora.magnitudes.get(layer)) is not None and magnitude.shape not in (
            (torch_shape(kernel.shape)[0], 1),
            (1, torch_shape(kernel.shape)[1]),
        ):
            wrong.append(f"{layer} is {torch_shape(kernel.shape)}, DoRA's magnitudes are {magnitude.shape}")
    if wrong:
        shapes = {layer: lora.shape(layer) for layer in lora.layers}
        others = {
            name.removesuffix(".kernel"): torch_shape(leaf.shape)
            for name, leaf in base.items()
            if leaf.ndim > 1
        }
        theirs, ours = family(shapes), family(others)
        remark = (
            f" (the LoRA is for {theirs}, this is {ours or 'another'})" if theirs and theirs != ours else ""
        )
        raise InputError(f"the LoRA does not fit {base_name} in {len(wrong)} layers{remark}: {listed(wrong)}")


def fuse(
    base: Mapping[str, np.ndarray], lora: Lora, *others: Lora, strengths: Sequence[float] | None = None
) -> dict[str, np.ndarray]:
    """Returns the base with LoRAs added, each times its strength, in float32, in the base's types.

    Every kernel is rounded once. Raises InputError as `require_fit` does, and for a layer with DoRA's magnitudes at
    another strength than 1 or beside another LoRA's change: PEFT and the web UIs differ there.
    """
    loras = [lora, *others]
    strengths = [1.0] * len(loras) if strengths is None else strengths
    fused = dict(base)
    for one in loras:
        require_fit(one, base, "the base")
    for layer in sorted({layer for one in loras for layer in one.layers}):
        changing = [
            (one, strength) for one, strength in zip(loras, strengths, strict=True) if layer in one.scales
        ]
        dora = any(layer in one.magnitudes for one, _ in changing)
        if dora and (len(changing) > 1 or changing[0][1] != 1.0):
            raise InputError(
                f"{layer} is changed by a DoRA with another strength than 1, or by another LoRA too: what that means "
                "differs from reader to reader; fuse it alone"
            )
        kernel = base[f"{layer}.kernel"]
        total = kernel.astype(np.float32)
        for one, strength in changing:
            update = one.delta(layer, kernel.shape)
            total = total + (update if strength == 1.0 else np.float32(strength) * update)
        if dora:
            total = changing[0][0].magnified(layer, total)
        fused[f"{layer}.kernel"] = total.astype(kernel.dtype)
    return fused


def fuse_model(model: Model, requests: Sequence[Request], alpha: float | str | None = None) -> Model:
    """Returns a model with LoRAs in the weights of its UNet and of its text encoders.

    `alpha` is explained at `read_loras`. Raises InputError as `read_loras`, `require_fit` and `fuse` do, and for a
    LoRA of a text encoder that the model has not.
    """
    layers = {"unet": layers_of(model.unet.params)}
    towers = {}
    if model.pipeline is not None:
        opened = load_pipeline(model.pipeline)
        towers = {name: opened.component_dir(name) for name in opened.text_encoders}
        layers |= {name: layers_of(network(opened.configs[name]).shapes) for name in towers}
    found: dict[str, list[tuple[Lora, float]]] = {}
    for request in requests:
        loras = read_loras(request.source, alpha, layers)
        if missing := [part for part in loras if part not in layers]:
            kind = "has none" if towers else "is a UNet on its own"
            raise InputError(
                f"{request.source} is for a {' and a '.join(missing)} too, and {model.name} {kind}"
            )
        for part, lora in loras.items():
            found.setdefault(part, []).append((lora, request.strength))
    unet, text_encoders = model.unet, dict(model.text_encoders)
    for part, several in found.items():
        component = unet if part == "unet" else text_encoders.get(part) or load_component(towers[part])
        its, strengths = zip(*several, strict=True)
        for one in its:
            require_fit(one, component.params, f"the {part} of {model.name}")
        params = fuse(component.params, *its, strengths=strengths)
        if part == "unet":
            unet = Component(unet.config, params)
        else:
            text_encoders[part] = Component(component.config, params)
    return dataclasses.replace(model, unet=unet, text_encoders=text_encoders)


def fuse_file(
    model: Model,
    loras: str | Path | Sequence[str | Path],
    out: str | Path,
    alpha: float | str | None = None,
    *,
    dtype: Any | None = None,
) -> None:
    """Writes a model with LoRAs fused: one or several, each `SOURCE[:STRENGTH]`, a file, a folder or a hub id.

    `alpha` is explained at `read_loras`, `dtype` at `save_model`.

    Raises InputError as `parse_request`, `fuse_model` and `save_model` do; nothing is written then.
    """
    several = [loras] if isinstance(loras, str | Path) else loras
    requests = [parse_request(str(one)) for one in several]
    save_model(out, fuse_model(model, requests, alpha), dtype=dtype)
