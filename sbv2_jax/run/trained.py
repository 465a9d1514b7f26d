"""What a run's checkpoints hold: its arrays, its configuration, and its student as a model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sbv2_jax import checkpoint
from sbv2_jax.checkpoint.manifest import flatten
from sbv2_jax.convert.formats.component import Component, load_component
from sbv2_jax.convert.formats.pipeline import student_scheduler
from sbv2_jax.convert.lora.files import modules_of
from sbv2_jax.convert.lora.fuse import require_fit
from sbv2_jax.convert.lora.kinds import Lora
from sbv2_jax.convert.model import Model, open_model
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.run.components import Parts, latent_side, read_parts
from sbv2_jax.run.directory import CHECKPOINTS, is_run

# What a configuration must say for its checkpoint to be converted.
_NEEDED = (
    "teacher",
    "architecture",
    "resolution",
    "student.init",
    "student.mode",
    "student.lora.rank",
    "student.lora.alpha",
    "score.rank",
    "score.alpha",
    "ema",
)


def read_run(run: str | Path, step: int | None, prefix: str) -> tuple[int, dict[str, np.ndarray], ConfigDict]:
    """Returns a checkpoint's step, its arrays whose names start with `prefix`, and the run's configuration.

    Without a `step` it is the newest one that verifies; the run may be training. Raises InputError for a
    directory that holds no distillation's checkpoints, and for a step that does not verify.
    """
    checkpoints = Path(run) / CHECKPOINTS
    found, arrays, manifest = checkpoint.load(checkpoints, step, prefix)
    known = flatten(manifest.config)
    if missing := [name for name in _NEEDED if name not in known]:
        raise InputError(f"{checkpoints} is not of a distillation: its config lacks {', '.join(missing)}")
    return found, arrays, ConfigDict(manifest.config)


def student_of(
    run: str | Path,
    *,
    step: int | None = None,
    which: str | None = None,
    base: str | None = None,
    init: str | None = None,
) -> tuple[int, Model]:
    """Returns a checkpoint's step and its student, in the teacher's pipeline.

    Args:
      run, step: as for `read_run`.
      which: "student" or "ema"; without it, the average where the run keeps one.
      base, init: the teacher's pipeline and what the student started from, where they are no longer where the
        run found them.

    Raises InputError as `read_run` does, and for parts that are missing or do not fit.
    """
    if which is None:
        # a scalar: only the configuration is wanted
        which = kept_student(read_run(run, step, "step")[2])
    found, trained, config = read_run(run, step, f"{which}.")
    if base is not None:
        config.teacher = base
    if init is not None:
        config.student.init = init
    config.terms = ()  # they are not needed any more
    lora = config.student.lora
    parts = read_parts(config)
    return found, model_of(
        str(run),
        trained,
        parts,
        lora_scale=lora.alpha / lora.rank,
        side=latent_side(config, parts),
        timesteps=tuple(config.student.get("timesteps", ())),
    )


def kept_student(config: ConfigDict) -> str:
    """Returns which student stands for a run where none is asked for: "ema" where it keeps an average."""
    return "ema" if config.ema else "student"


def model_of(
    name: str,
    trained: dict[str, np.ndarray],
    parts: Parts,
    *,
    lora_scale: float,
    side: int,
    timesteps: tuple[int, ...],
) -> Model:
    """Returns a run's student, of these weights or factors of its LoRA, in the teacher's pipeline.

    `side` is that of the latents that it was trained with, which it draws unless asked for others.
    """
    return student_model(
        name,
        trained,
        base=parts.opened[0],
        config=dataclasses.replace(parts.student.config, sample_size=side),
        schedule=parts.student_schedule,
        init=parts.student.files,
        lora_scale=lora_scale,
        timesteps=timesteps,
    )


def open_run_or_model(model: str | Path) -> Model:
    """Opens a pipeline, a UNet on its own, or a run, which stands for its newest student that verifies.

    Raises InputError as `open_model` and `student_of` do.
    """
    if is_run(model):
        return student_of(model)[1]
    return open_model(model)


def student_model(
    name: str,
    trained: Mapping[str, np.ndarray],
    *,
    base: Path,
    config: UNetConfig,
    schedule: ScheduleConfig,
    init: Path,
    lora_scale: float,
    timesteps: tuple[int, ...] = (),
) -> Model:
    """Returns a student in the pipeline from which diffusers draws in one step, or in its own few.

    Args:
      name: of the model.
      trained: the student's weights, or the factors of its LoRA, which are merged into those of `init`, all
        in float32, with the factor `lora_scale`.
      base: the pipeline that the other parts are taken from.
      config, schedule: of the student's UNet.
      init: the directory of the UNet that the student started from; read for a LoRA only.
      timesteps: those of its steps, as `config.student.timesteps`.

    Raises InputError as `load_component` does, and for a LoRA that does not fit `init`.
    """
    weights = dict(trained)
    if any(lora.is_lora(leaf) for leaf in trained):
        factors = {leaf: np.asarray(array) for leaf, array in trained.items()}
        weights = load_component(init, dtype=jnp.float32).params
        require_fit(Lora(factors, dict.fromkeys(modules_of(factors), lora_scale)), weights, str(init))
        for module in modules_of(factors):
            # In its place: no more than one is held twice.
            own = {leaf: array for leaf, array in factors.items() if leaf.startswith(f"{module}.lora.")}
            kernel = {f"{module}.kernel": jnp.asarray(weights[f"{module}.kernel"])}
            weights |= jax.tree.map(np.asarray, lora.merge(kernel, own, lora_scale))
    fields = {
        field.name: getattr(schedule, field.name)
        for field in dataclasses.fields(schedule)
        if not field.metadata
    }
    scheduler = student_scheduler({"_class_name": "DDPMScheduler", **fields}, timesteps)
    return Model(name, Component(config, weights), base, scheduler)
