"""A trained student as a diffusers pipeline directory."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sbv2_jax import lora
from sbv2_jax.assemble import Run
from sbv2_jax.convert.component import Component, load_component
from sbv2_jax.convert.pipeline import save_pipeline
from sbv2_jax.state import TrainState
from sbv2_jax.tree import Params


def export_student(run: Run, state: TrainState, directory: Path) -> None:
    """Writes the student, averaged where the run keeps an average, as a pipeline for one step in diffusers.

    The other parts are the teacher's. The student's weights are float32; a LoRA is merged into its base in
    float32. An older export of the same run is replaced.
    """
    trained = _on_host(state.ema or state.student)
    if jax.process_index() != 0:
        return
    if run.lora_student:
        base = load_component(run.parts.student.directory, dtype=jnp.float32).params
        merged = lora.merge(base, trained, run.objective.student_lora_scale)
        trained = {name: np.asarray(leaf) for name, leaf in merged.items()}
    scratch = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    save_pipeline(
        scratch,
        base=run.parts.pipeline,
        unet=Component(run.parts.student.config, trained),
        scheduler={"_class_name": "DDPMScheduler", **dataclasses.asdict(run.parts.student_schedule)},
        one_step=True,
    )
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)


def _on_host(params: Params) -> dict[str, np.ndarray]:
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return jax.device_get(params)
