"""A trained student, all of its weights or a LoRA's, as a model for one step."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sbv2_jax.convert.formats.component import Component, load_component
from sbv2_jax.convert.formats.pipeline import one_step_scheduler
from sbv2_jax.convert.lora.files import modules_of
from sbv2_jax.convert.lora.fuse import require_fit
from sbv2_jax.convert.lora.kinds import Lora
from sbv2_jax.convert.model import Model
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.models import lora
from sbv2_jax.models.unet import UNetConfig


def student_model(
    name: str,
    trained: Mapping[str, np.ndarray],
    *,
    base: Path,
    config: UNetConfig,
    schedule: ScheduleConfig,
    init: Path,
    lora_scale: float,
) -> Model:
    """Returns a student in the pipeline from which diffusers draws in one step.

    Args:
      name: of the model.
      trained: the student's weights, or the factors of its LoRA, which are merged into those of `init`, all
        in float32, with the factor `lora_scale`.
      base: the pipeline that the other parts are taken from.
      config, schedule: of the student's UNet.
      init: the directory of the UNet that the student started from; read for a LoRA only.

    Raises InputError as `load_component` does, and for a LoRA that does not fit `init`.
    """
    weights = dict(trained)
    if any(lora.is_lora(leaf) for leaf in trained):
        start = load_component(init, dtype=jnp.float32).params
        require_fit(Lora(trained, dict.fromkeys(modules_of(trained), lora_scale)), start, str(init))
        merged = lora.merge(start, weights, lora_scale)
        weights = {leaf: np.asarray(array) for leaf, array in merged.items()}
    scheduler = one_step_scheduler({"_class_name": "DDPMScheduler", **dataclasses.asdict(schedule)})
    return Model(name, Component(config, weights), base, scheduler)
