"""A checkpoint in one file, in the original names of Stable Diffusion 1.x, 2.x or XL, or a UNet alone.

The file holds networks. What else a pipeline is, configurations, tokenizer and scheduler, comes from a pipeline of the
same shapes, the base; so do the networks that the file does not have.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from sbv2_jax.convert.formats import openclip_names
from sbv2_jax.convert.formats.component import Component, save_component
from sbv2_jax.convert.formats.ldm_names import unet_names, vae_name
from sbv2_jax.convert.formats.legacy import current_names
from sbv2_jax.convert.formats.names import to_ours, torch_names
from sbv2_jax.convert.formats.pipeline_directory import open_pipeline, write_pipeline
from sbv2_jax.convert.formats.published_shapes import torch_shape
from sbv2_jax.convert.formats.safetensors_io import DTYPES, TensorInfo, read_header, read_tensors
from sbv2_jax.devices.cache import user_cache
from sbv2_jax.diffusion.schedule import PREDICTION_TYPES, ScheduleConfig
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models import published
from sbv2_jax.models.clip import CLIPTextConfig
from sbv2_jax.models.config import ModelConfig, of_kind
from sbv2_jax.models.registry import class_of, network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.models.vae import VAEConfig

_UNET = ("model.diffusion_model.", "diffusion_model.", "")
_VAE = ("first_stage_model.", "vae.")
# Of a tower: the places it may have, and whether its names there are OpenCLIP's.
_TOWERS = {
    "text_encoder": {
        "cond_stage_model.transformer.": False,
        "cond_stage_model.model.": True,
        "conditioner.embedders.0.transformer.": False,
    },
    "text_encoder_2": {"conditioner.embedders.1.model.": True},
}
# The noise schedule as buffers, averages beside the weights that are taken, and what only training asks for.
_NOT_READ = re.compile(
    r"betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+|logvar|lvlb_weights|"
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|denoiser\.(sigmas|log_sigmas)|global_step|"
    r".*\.(logit_scale|attn_mask|position_ids)|v_pred|ztsnr"
)
_OTHERS = {
    "conditioner.embedders.0.model.": "SDXL's refiner",
    "control_model.": "a ControlNet",
    "edm_mean": "a model of EDM's sigmas",
    "edm_vpred.sigma_max": "a model of EDM's sigmas",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "lora_": "a LoRA",
    "unet.": "a LoRA, or a pipeline's weights in diffusers' names",
}
_V_PREDICTION = "v_prediction"


class _Taken(NamedTuple):
    """Where a tensor of diffusers or transformers is in the file: its name and shapes there, which third of it, or
    whether it is transposed."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    openclip: openclip_names.Source | None = None


def convert(
    file: str | Path,
    out: str | Path,
    *,
    base: Path | None = None,
    prediction_type: str | None = None,
    dtype: Any | None = "float32",
) -> None:
    """Writes a single-file checkpoint as a pipeline that diffusers loads; without a base, a UNet alone.

    Args:
      file: a safetensors file.
      out: a new or empty directory.
      base: the directory of the pipeline, of the same shapes, that gives what the file does not hold.
      prediction_type: "epsilon" or "v_prediction"; without it, what the file says, or else the base's scheduler.
      dtype: of all weights; None keeps those of the files.

    Raises InputError for a file of another kind, listing the tensors that do not fit; where a pipeline needs a base;
    and where the file leaves open what its network predicts (Stable Diffusion 2). Nothing is written then.
    """
    file = Path(file).expanduser()
    if base is None:
        infos = read_header(file)
        whole = [prefix for prefix in (*_VAE, *_TOWERS["text_encoder"]) if _has(infos, prefix)]
        if whole or prediction_type is not None:
            raise InputError(
                f"{file} has no tokenizer and no scheduler: name a pipeline of its family{_family(infos)} as the base "
                "to take them from"
            )
        unet = read_unet(file, None)
        save_component(out, unet.config, unet.params, dtype=dtype)
        return
    opened = open_pipeline(base)
    networks = _read(file, {name: opened.configs[name] for name in opened.family.networks})
    scheduler = _scheduler(file, opened.scheduler, opened.unet, prediction_type)
    write_pipeline(
        out,
        base=opened,
        scheduler=scheduler,
        dtype=dtype,
        unet=networks["unet"],
        vae=networks.get("vae"),
        text_encoder=networks.get("text_encoder"),
        text_encoder_2=networks.get("text_encoder_2"),
    )


def directory_of(file: str | Path, base: Path | None = None, like: UNetConfig | None = None) -> Path:
    """Returns a directory with what `convert` makes of a file, or, without a base, of its UNet: made once, and kept.

    It lies in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`), under a name that changes with the file and the
    base; weights keep their types. `like` is explained at `read_unet`. Raises InputError as `convert` does.
    """
    file = Path(file).expanduser()
    try:
        found = file.stat()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    directory = None if base is None else open_pipeline(base).directory.resolve()
    state = None if directory is None else (directory / "model_index.json").stat().st_mtime_ns
    key = f"{file.resolve()} {found.st_size} {found.st_mtime_ns} {directory} {state} {like}"
    cache = user_cache() / "single_file"
    out = cache / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not out.is_dir():
        logging.warning("%s is converted once, into %s", file, out)
        try:
            if directory is None:
                unet = read_unet(file, like)
                save_component(out, unet.config, unet.params)
            else:
                convert(file, out, base=directory, dtype=None)
        except InputError:
            if not out.is_dir():  # another process of the same run was first
                raise
    return out


def read_unet(file: Path, like: UNetConfig | None) -> Component[ModelConfig]:
    """Reads the UNet of a file, of this configuration or, without one, of the family whose shapes it has."""
    infos = read_header(file)
    prefix = _unet_prefix(file, infos)
    if like is None:
        found = [config for _, config in _families() if not _misfits(infos, _unet(config, infos, prefix))]
        if not found:
            raise InputError(
                f"{file} does not have the shapes of a known family{_family(infos)}: name a pipeline of its "
                "shapes as the base"
            )
        like = found[0]
    if "v_pred" in infos:
        raise InputError(
            f"{file} says that it predicts v, which a UNet alone cannot say: convert it with a base (from-single-file)"
        )
    return _read(file, {"unet": like})["unet"]


def _read(file: Path, configs: Mapping[str, ModelConfig]) -> dict[str, Component[ModelConfig]]:
    """Reads the networks of these configurations that the file has; raises InputError for what does not fit."""
    infos = read_header(file)
    plans: dict[str, dict[str, _Taken]] = {}
    used: set[str] = set()
    for part, config in configs.items():
        plan, theirs = _plan(file, infos, part, config)
        if plan:
            plans[part] = plan
            used |= theirs
    wrong = [line for plan in plans.values() for line in _misfits(infos, plan)]
    # Of a UNet that is wanted alone, the other networks of its file are no concern.
    prefix = "" if len(configs) > 1 else _unet_prefix(file, infos)
    stray = [
        name
        for name in infos
        if name.startswith(prefix) and name not in used and not _NOT_READ.fullmatch(name)
    ]
    wrong += [f"unexpected {ascii(name)[1:-1]} {infos[name].shape}" for name in stray]
    if wrong:
        raise InputError(
            f"{file} does not fit {'the base' if len(configs) > 1 else 'the UNet that it is for'} in {len(wrong)} "
            f"tensors: {listed(wrong)}; `convert.py inspect --model={file}` lists its tensors{_family(infos)}"
        )
    _tell(file, infos)
    return {part: _component(file, infos, configs[part], plan) for part, plan in plans.items()}


def _plan(
    file: Path, infos: Mapping[str, TensorInfo], part: str, config: ModelConfig
) -> tuple[dict[str, _Taken], set[str]]:
    """Returns where a network's tensors are, by today's names, and the names in the file that belong to it."""
    if part == "unet":
        plan = _unet(config, infos, _unet_prefix(file, infos))
        return plan, {taken.name for taken in plan.values()}
    if part == "vae":
        prefix = next((one for one in _VAE if _has(infos, one)), None)
        if prefix is None or not isinstance(config, VAEConfig):
            return {}, set()
        shapes: dict[str, tuple[tuple[int, ...], ...]]
        shapes = {name: (shape,) for name, shape in _shapes(config).items()}
        for name, (shape,) in shapes.items():
            if ".attentions." in name and len(shape) == 2:  # a convolution in the original code
                shapes[name] = (shape, (*shape, 1, 1), (*shape, 1))
        plan = {name: _Taken(prefix + vae_name(name, config), one) for name, one in shapes.items()}
        return plan, {taken.name for taken in plan.values()}
    for prefix, openclip in _TOWERS[part].items():
        own = {name for name in infos if name.startswith(prefix)}
        if own and openclip:
            tower = of_kind(config, CLIPTextConfig, f"the {part} for {file}")
            return _openclip(tower, prefix), own & _known_openclip(tower, prefix, own)
        if own:
            today = current_names(class_of(config), [name.removeprefix(prefix) for name in own], str(file))
            names = {new: prefix + old for old, new in today.items()}
            plan = {
                name: _Taken(names.get(name, prefix + name), (shape,))
                for name, shape in _shapes(config).items()
            }
            left = own - set(names.values())
            return plan, left | {taken.name for taken in plan.values()}
    return {}, set()


def _unet(config: ModelConfig, infos: Mapping[str, TensorInfo], prefix: str) -> dict[str, _Taken]:
    shapes = _shapes(config)
    original = f"{prefix}input_blocks.0.0.weight" in infos
    names = unet_names(shapes) if original else {}
    return {name: _Taken(prefix + names.get(name, name), (shape,)) for name, shape in shapes.items()}


def _openclip(config: ModelConfig, prefix: str) -> dict[str, _Taken]:
    sources = openclip_names.sources_of(network(config).shapes)
    return {name: _Taken(prefix + one.name, (one.shape,), one) for name, one in sources.items()}


def _known_openclip(config: CLIPTextConfig, prefix: str, names: set[str]) -> set[str]:
    """Returns the names of an OpenCLIP tower's file that are its parameters, or that this tower does not use.

    Stable Diffusion 2 takes the last layer but one, so that the file holds a layer more than the tower.
    """
    layer = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\..*")
    unused = {
        name
        for name in names
        if (match := layer.fullmatch(name)) and int(match[1]) >= config.num_hidden_layers
    }
    return (
        unused | {taken.name for taken in _openclip(config, prefix).values()} | {f"{prefix}text_projection"}
    )


def _component(
    file: Path, infos: Mapping[str, TensorInfo], config: ModelConfig, plan: Mapping[str, _Taken]
) -> Component[ModelConfig]:
    wanted = {taken.name for taken in plan.values()}
    read = dict(
        read_tensors(file, {name: info for name, info in infos.items() if name in wanted}, mapped=True)
    )
    ours, params = torch_names(network(config).shapes), {}
    for name, shape in _shapes(config).items():
        taken = plan[name]
        array = read[taken.name]
        array = openclip_names.tensor_of(array, taken.openclip) if taken.openclip else array.reshape(shape)
        params[ours[name]] = to_ours(ours[name], array)
    return Component(config, params)


def _misfits(infos: Mapping[str, TensorInfo], plan: Mapping[str, _Taken]) -> list[str]:
    wrong = []
    for taken in {taken.name: taken for taken in plan.values()}.values():
        info = infos.get(taken.name)
        if info is None:
            wrong.append(f"missing {taken.name} {taken.shapes[0]}")
        elif info.shape not in taken.shapes:
            wrong.append(f"{taken.name} has shape {info.shape}, expected {taken.shapes[0]}")
        elif info.dtype not in DTYPES:
            wrong.append(f"{taken.name} has type {info.dtype}, expected one of {', '.join(DTYPES)}")
    return wrong


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = network(config).shapes
    return {name: torch_shape(ours, shapes[ours].shape) for name, ours in torch_names(shapes).items()}


def _unet_prefix(file: Path, infos: Mapping[str, TensorInfo]) -> str:
    for prefix, kind in _OTHERS.items():
        if _has(infos, prefix):
            raise InputError(f"{file} is {kind}, which is not supported here")
    for prefix in _UNET:
        for first in ("input_blocks.0.0.weight", "conv_in.weight"):
            if (info := infos.get(prefix + first)) is not None:
                if len(info.shape) == 4 and info.shape[1] in (8, 9):
                    raise InputError(
                        f"{file} is for editing or inpainting: its UNet takes {info.shape[1]} channels, not 4"
                    )
                return prefix
    raise InputError(
        f"{file} holds no UNet of Stable Diffusion (no model.diffusion_model.input_blocks.0.0.weight)"
    )


def _families() -> list[tuple[str, UNetConfig]]:
    return [
        (name, UNetConfig.from_dict(parts["unet"], name)) for name, parts in published.ARCHITECTURES.items()
    ]


def _family(infos: Mapping[str, TensorInfo]) -> str:
    """Returns ` (its shapes are those of sdxl)` for an error's text; empty where they are of no known family."""
    for prefix in _UNET:
        if _has(infos, f"{prefix}input_blocks.0.0.weight") or _has(infos, f"{prefix}conv_in.weight"):
            for name, config in _families():
                plan = _unet(config, infos, prefix)
                if len(_misfits(infos, plan)) <= len(plan) // 50:
                    return f" (its shapes are those of {name})"
            break
    return ""


def _has(infos: Mapping[str, TensorInfo], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in infos)


def _scheduler(
    file: Path, base: Mapping[str, Any], unet: UNetConfig, prediction_type: str | None
) -> dict[str, Any]:
    """Returns the scheduler_config.json of the file: the base's, with what the file or the caller says.

    Raises InputError where nobody says what the network predicts, and for a file of another noise schedule.
    """
    infos = read_header(file)
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise InputError(f"prediction_type={prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
    if "v_pred" in infos:
        if prediction_type not in (None, _V_PREDICTION):
            raise InputError(
                f"{file} says that it predicts v: --prediction_type={prediction_type} contradicts it"
            )
        prediction_type = _V_PREDICTION
    # Both kinds of Stable Diffusion 2 have the same shapes.
    second = _has(infos, "cond_stage_model.model.") or set(unet.per_level("cross_attention_dim")) == {1024}
    if second and prediction_type is None:
        raise InputError(
            f"{file} is of Stable Diffusion 2, and does not say what it predicts (the base: "
            f"{base.get('prediction_type', 'epsilon')}): --prediction_type=epsilon (512 px) or v_prediction (768 px)"
        )
    values = dict(base) | ({} if prediction_type is None else {"prediction_type": prediction_type})
    if "ztsnr" in infos:
        values["rescale_betas_zero_snr"] = True
    config = ScheduleConfig.from_dict(values, f"the scheduler of the base of {file}")
    stored = infos.get("alphas_cumprod")
    if stored is not None and stored.dtype in DTYPES and "ztsnr" not in infos:
        ((_, abar),) = read_tensors(file, {"alphas_cumprod": stored}, mapped=False)
        want = config.alphas_cumprod()
        if abar.shape != want.shape or np.abs(abar.astype(np.float64) - want).max() > 2e-3:
            raise InputError(
                f"{file} was trained with another noise schedule (alphas_cumprod) than its base's"
            )
    return values


def _tell(file: Path, infos: Mapping[str, TensorInfo]) -> None:
    if averages := [name for name in infos if name.startswith("model_ema.")]:
        logging.warning(
            "%s: %d averaged weights (model_ema) are left out, as by diffusers", file, len(averages)
        )
