"""A Stable Diffusion or SDXL pipeline directory in the layout of diffusers: opened part by part, and written."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbv2_jax.convert.formats.component import (
    Component,
    declared_dtype,
    load_component,
    load_config,
    write_component,
)
from sbv2_jax.convert.formats.families import (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    Family,
    check_fit,
    family_of,
    make_index,
    zero_null,
)
from sbv2_jax.convert.formats.files import (
    existing_directory,
    file_of,
    new_directory,
    read_json,
    require_own_link,
    write_json,
)
from sbv2_jax.convert.formats.side_files import copy_clip_files, tokenizer_files, write_preprocessor
from sbv2_jax.diffusion.few_steps import ORIGINAL_STEPS, original_steps_of
from sbv2_jax.diffusion.schedule import FEW_STEPS, ScheduleConfig
from sbv2_jax.errors import InputError
from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.config import AutoencoderConfig, ModelConfig, of_kind
from sbv2_jax.models.registry import class_of
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair, load_fitting
from sbv2_jax.models.unet import UNetConfig

# Networks that training needs and diffusers' pipeline does not know: folders beside the others.
_EXTRAS = {"vae_tiny": ("AutoencoderTiny",), "clip": ("CLIPModel",)}
# Every folder of a pipeline: SDXL has all that the others have.
_PARTS = STABLE_DIFFUSION_XL.parts


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineParts:
    """An opened pipeline: its settings are read and checked, its weights are read when asked for.

    `component` loads a network, and keeps none.
    """

    directory: Path
    dtype: Any | None
    configs: Mapping[str, ModelConfig]
    """The configuration of every network of the pipeline, by the name of its folder."""
    scheduler: Mapping[str, Any]
    """The values of scheduler_config.json as they are."""
    schedule_config: ScheduleConfig
    family: Family
    zero_null: bool
    """Whether the null condition is zeros, not the encoded empty prompt (SDXL)."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The folders of the text towers: one, or SDXL's two."""
        return self.family.towers

    @property
    def unet(self) -> UNetConfig:
        """The configuration of the UNet."""
        return of_kind(self.configs["unet"], UNetConfig, str(self.directory / "unet"))

    @property
    def vae(self) -> AutoencoderConfig:
        """The configuration of the autoencoder."""
        return of_kind(self.configs["vae"], AutoencoderConfig, str(self.directory / "vae"))

    @property
    def towers(self) -> dict[str, CLIPTextConfig]:
        """The configurations of the text towers, by the names of their folders."""
        return {
            name: of_kind(self.configs[name], CLIPTextConfig, str(self.directory / name))
            for name in self.text_encoders
        }

    def component(self, name: str, *, dtype: Any | None = None) -> Component[ModelConfig]:
        """Loads one network; raises InputError where the pipeline has none of this name."""
        directory = component_dir(self.directory, name)
        return load_component(directory, dtype=self.dtype if dtype is None else dtype)

    def component_dir(self, name: str) -> Path:
        """Returns the folder of one part."""
        return component_dir(self.directory, name)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | TokenizerPair:
        found = [
            load_fitting(self.component_dir(name), self.towers[name.replace("tokenizer", "text_encoder")])
            for name in self.family.tokenizers
        ]
        return found[0] if len(found) == 1 else TokenizerPair(*found)


def component_dir(directory: str | Path, name: str) -> Path:
    """Returns the folder of one part (`unet`, `vae`, `text_encoder`, `vae_tiny`, `clip` ...) of a pipeline.

    A directory that is itself a network of this kind is returned as it is: a bare UNet can stand for a
    pipeline where only the UNet is needed.
    Raises InputError for a missing folder, and as `files.require_own_link` does.
    """
    directory = existing_directory(directory)
    if name not in _PARTS and name not in _EXTRAS:
        raise InputError(f"no part of a pipeline is named {name!r} ({', '.join((*_PARTS, *_EXTRAS))})")
    classes = _EXTRAS.get(name) or _PARTS[name][1]
    if not (directory / "model_index.json").exists() and (directory / "config.json").exists():
        found = class_of(load_config(directory))
        if found not in classes:
            raise InputError(f"{directory} is a {found}, no pipeline and no {' or '.join(classes)}")
        return directory
    folder = directory / name
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist")
    require_own_link(folder)
    return folder


def open_pipeline(directory: Path, *, dtype: Any | None = None) -> PipelineParts:
    """Opens a pipeline's directory; no weights are read yet.

    The networks keep their files' types unless `dtype` is asked for.
    Raises InputError for a pipeline of another class, a missing part, a part of an unsupported class or
    configuration, and parts that do not fit each other, its tokenizers included.
    """
    index_path = file_of(directory, "model_index.json")
    index = read_json(index_path)
    family = family_of(index, str(index_path))
    configs = {name: load_config(component_dir(directory, name)) for name in family.networks}
    for name, classes in _EXTRAS.items():
        if (directory / name).exists():
            configs[name] = load_config(component_dir(directory, name))
            if class_of(configs[name]) not in classes:
                raise InputError(f"{directory / name} is a {class_of(configs[name])}, expected {classes[0]}")
    for name in family.networks:
        if class_of(configs[name]) != index[name][1]:
            raise InputError(
                f"{directory / name} is a {class_of(configs[name])}, but {index_path} says {index[name][1]}"
            )
    check_fit(family, configs, str(directory))
    parts = PipelineParts(
        directory=directory,
        dtype=dtype,
        configs=configs,
        scheduler=read_json(_scheduler_file(directory)),
        schedule_config=read_schedule(directory),
        family=family,
        zero_null=zero_null(family, index),
    )
    _ = (
        parts.tokenizer
    )  # read, to be checked: whatever is done with a pipeline, pictures are to be drawn with it
    return parts


def read_schedule(directory: str | Path) -> ScheduleConfig:
    """Reads `scheduler/scheduler_config.json` of a pipeline directory; raises InputError as it does."""
    path = _scheduler_file(directory)
    return ScheduleConfig.from_dict(read_json(path), str(path))


def _scheduler_file(directory: str | Path) -> Path:
    return file_of(component_dir(directory, "scheduler"), "scheduler_config.json")


def one_step_scheduler(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scheduler_config.json with which one step of diffusers is x0 = (z - s eps) / a at T-1.

    Of diffusers' samplers it is the ancestral one (DDPM) with "trailing" timesteps that starts at T-1, ends at
    x0 and adds nothing: `pipe(prompt, num_inference_steps=1, guidance_scale=0)`. The betas and the prediction
    type are those of `values`, any supported scheduler_config.json. Raises InputError as `ScheduleConfig` does.
    """
    config = ScheduleConfig.from_dict(dict(values))
    betas = None if config.trained_betas is None else list(config.trained_betas)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "trained_betas": betas,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "clip_sample": False,
        "thresholding": False,
        "variance_type": "fixed_small",
    }


def student_scheduler(values: Mapping[str, Any], timesteps: Sequence[int]) -> dict[str, Any]:
    """Returns the scheduler_config.json with which diffusers draws as a student of these timesteps does.

    Of the last alone, or of none, it is `one_step_scheduler`. Of others it is that of an LCMScheduler with boundary
    scalings too small to count, which also holds the timesteps, under a name that diffusers passes over. How it is to
    be called, `diffusers_arguments` says. Raises InputError as `ScheduleConfig` does.
    """
    one, last = one_step_scheduler(values), ScheduleConfig.from_dict(dict(values)).num_train_timesteps - 1
    if tuple(timesteps) in ((), (last,)):
        return one
    del one["variance_type"]
    few = {
        "_class_name": FEW_STEPS,
        "original_inference_steps": original_steps_of(timesteps, last + 1) or ORIGINAL_STEPS,
        "timestep_scaling": 1e4,
        "_timesteps": list(timesteps),
    }
    ScheduleConfig.from_dict(one | few)
    return one | few


def diffusers_arguments(scheduler: Mapping[str, Any]) -> str:
    """Returns what diffusers' pipeline must be called with to draw as a student of this scheduler_config.json does."""
    config = ScheduleConfig.from_dict(dict(scheduler))
    timesteps, count = config.timesteps, len(config.timesteps) or 1
    by_number = not timesteps or original_steps_of(timesteps, config.num_train_timesteps)
    steps = f"num_inference_steps={count}" if by_number else f"timesteps={list(timesteps)}"
    return f"{steps}, guidance_scale=0"


def write_pipeline(
    directory: str | Path,
    *,
    unet: Component | Path | None = None,
    vae: Component | Path | None = None,
    text_encoder: Component | Path | None = None,
    text_encoder_2: Component | Path | None = None,
    tokenizer_dir: str | Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
    vae_tiny: Component | Path | None = None,
    clip: Component | Path | None = None,
    base: PipelineParts | None = None,
    one_step: bool = False,
    dtype: Any | None = "float32",
    orbax: bool = False,
) -> None:
    """Writes a pipeline directory that diffusers' `DiffusionPipeline.from_pretrained` loads.

    A network is given as it is, or as the directory to take it from (one is in memory at a time then), a CLIP
    with the `preprocessor_config.json` and the tokenizer that lie there. `scheduler` holds the values of a
    scheduler_config.json; with `one_step` it becomes `one_step_scheduler`. What is not given is taken from the
    pipeline `base`, without which no SDXL is written. All weights are of one `dtype`, since PyTorch multiplies
    no two types; None keeps those of the parts, and what their config.json files say of them. With `orbax` the
    weights are written as Orbax checkpoints: the directory is then one for this package, not for diffusers.
    All is written next to `directory` and renamed at the end. Raises InputError for a directory that is not
    empty or cannot be written, and for parts that are missing, wrong, or do not fit each other.
    """
    given: dict[str, Component | Path | None] = {
        "unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2,
        "vae_tiny": vae_tiny, "clip": clip,
    }  # fmt: skip
    family, zeros = STABLE_DIFFUSION, False
    tokenizers: dict[str, str | Path] = {}
    if base is not None:
        family, zeros = base.family, base.zero_null
        tokenizers = {name: base.component_dir(name) for name in family.tokenizers}
        for name, part_given in given.items():
            if part_given is None and name in base.configs:
                given[name] = base.component_dir(name)
        scheduler = scheduler or base.scheduler
    if tokenizer_dir is not None:
        tokenizers["tokenizer"] = tokenizer_dir
    missing = [name for name in family.networks if given[name] is None]
    missing += ["tokenizer_dir"] * (not tokenizers) + ["scheduler"] * (scheduler is None)
    if missing or scheduler is None:
        raise InputError(f"a pipeline needs {', '.join(missing)}, or a base to take them from")
    if text_encoder_2 is not None and "text_encoder_2" not in family.parts:
        raise InputError(f"a {family.pipeline_class} has no text_encoder_2")
    parts = {name: part for name, part in given.items() if part is not None}
    configs = {
        name: part.config if isinstance(part, Component) else load_config(part)
        for name, part in parts.items()
    }
    check_fit(family, configs, str(directory))
    ScheduleConfig.from_dict(dict(scheduler), "the scheduler given")
    values = one_step_scheduler(scheduler) if one_step else dict(scheduler)
    token_files = {name: tokenizer_files(folder) for name, folder in tokenizers.items()}

    with new_directory(directory) as partial:
        for name, part in parts.items():
            (partial / name).mkdir()
            component = part if isinstance(part, Component) else load_component(part)
            kept = None if dtype is not None or isinstance(part, Component) else part
            write_component(
                partial / name,
                component.config,
                component.params,
                dtype=dtype,
                orbax=orbax,
                declared=None if kept is None else declared_dtype(kept),
            )
            del component  # before the next one is read
        clip = parts.get("clip")
        if isinstance(clip, Component):
            side = of_kind(clip.config, CLIPConfig, "clip").vision_config.image_size
            write_preprocessor(partial / "clip", CLIPImageConfig(size=side, crop_size=side))
        elif clip is not None:
            copy_clip_files(Path(clip), partial / "clip")
        for name, files in token_files.items():
            (partial / name).mkdir()
            for path in files:
                shutil.copyfile(path, partial / name / path.name)
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", values)
        index = make_index(family, configs, values["_class_name"], zeros)
        write_json(partial / "model_index.json", index)
