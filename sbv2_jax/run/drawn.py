"""What pictures are drawn of: a directory, a hub id, "bundled", or a run, which stands for its student."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sbv2_jax import cli
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.merge import require_mergeable
from sbv2_jax.convert.model import Model
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.errors import InputError
from sbv2_jax.generate.draw import Drawn
from sbv2_jax.generate.pipeline import Pipeline, open_pipeline, ready
from sbv2_jax.run.directory import is_run
from sbv2_jax.run.trained import kept_student, open_run_or_model, read_run, student_of


def load(path_or_id: str | Path, *, dtype: Any = jnp.float32) -> Pipeline:
    """Loads a pipeline in one dtype: a diffusers text-to-image directory, a hub id, "bundled", or a run.

    A run stands for its student: of the newest step that verifies, its average where it keeps one. In float16 an
    autoencoder of SDXL that says `force_upcast`, since it overflows there, stays in float32.
    Raises InputError for a path that is missing and for files that do not fit the networks.
    """
    return drawn_of(str(path_or_id), dtype=dtype).load()


def drawn_of(
    name: str, *, step: int | None = None, which: str | None = None, dtype: Any = jnp.float32
) -> Drawn:
    """Opens what is drawn of; of a run the newest step that verifies, or `step`, and its average where it keeps one.

    `which` is "student" or "ema", of a run. A run's weights are read at once, a model's when they are asked for.
    Raises InputError as `student_of` and `open_pipeline` do.
    """
    if not is_run(name):
        return Drawn(name, load_pipeline(name).schedule_config, lambda: open_pipeline(name, dtype=dtype))
    which = which or kept_student(read_run(name, step, "step")[2])
    found, student = student_of(name, step=step, which=which)
    said = f"{name} ({which} of step {found})"
    return Drawn(said, _around(student)[1], lambda: pipeline_of(student, dtype=dtype))


def pair_of(text: str) -> list[Model]:
    """Opens the two models or runs of "A,B"; raises InputError where they are not two, or cannot be merged."""
    names = [cli.path(name) for name in text.split(",")]
    if len(names) != 2:
        raise InputError(f"--merge={text}: two models are expected, A,B")
    models = [open_run_or_model(name) for name in names]
    require_mergeable(models)
    return models


def pipeline_of(model: Model, *, dtype: Any = jnp.float32) -> Pipeline:
    """Makes a UNet ready to draw in the pipeline around it; raises InputError where there is none."""
    directory, schedule = _around(model)
    parts = load_pipeline(directory, dtype=dtype)
    return ready(parts, model.name, unet=model.unet, schedule=schedule, dtype=dtype)


def _around(model: Model) -> tuple[Path, ScheduleConfig]:
    """Returns the directory of the pipeline around a UNet, and its own schedule."""
    if model.pipeline is None or model.scheduler is None:
        raise InputError(f"{model.name} is a UNet on its own: a pipeline is needed to draw")
    return model.pipeline, ScheduleConfig.from_dict(dict(model.scheduler), model.name)
