"""What a run has trained, from its state or from its checkpoints, in the files of diffusers."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sbv2_jax import checkpoint
from sbv2_jax.assemble import Run
from sbv2_jax.checkpoint.manifest import flatten
from sbv2_jax.convert.lora_files import save_lora
from sbv2_jax.convert.students import save_student
from sbv2_jax.errors import InputError
from sbv2_jax.parts import Parts, read_parts
from sbv2_jax.state import TrainState
from sbv2_jax.tree import Params

# What a configuration must say for its checkpoint to be converted.
_NEEDED = (
    "teacher",
    "architecture",
    "student.init",
    "student.mode",
    "student.lora.rank",
    "student.lora.alpha",
    "score.rank",
    "score.alpha",
    "ema",
)


def export_student(run: Run, state: TrainState, directory: Path) -> None:
    """Writes the student, averaged where the run keeps an average, as a pipeline for one step in diffusers.

    The other parts are the teacher's. The student's weights are float32; a LoRA is merged into its base in
    float32. An older export of the same run is replaced.
    """
    trained = _on_host(state.ema or state.student)
    if jax.process_index() != 0:
        return
    scratch = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    _save(scratch, trained, run.parts, run.objective.student_lora_scale)
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)


def export_checkpoint(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    which: str | None = None,
    base: str | None = None,
) -> int:
    """Writes the student of a run's checkpoint as `export_student` does; returns the checkpoint's step.

    Args:
      run: the run's directory, which may be training.
      out: a new or empty directory.
      step: the step to take; without it, the newest one that verifies.
      which: "student" or "ema"; without it, the average where the run keeps one.
      base: the teacher's pipeline, where it is no longer where the run found it.

    Raises InputError for a directory that holds no run's checkpoints, a step that does not verify, and parts
    that are missing or do not fit; nothing is written then.
    """
    if which not in (None, "student", "ema"):
        raise InputError(f"--which={which} is no student; it can be written as a LoRA file")
    found, trained, config = _read(run, step, which)
    if base is not None:
        config.teacher = base
    config.clip.model = ""  # its loss is not needed any more
    lora = config.student.lora
    _save(Path(out), trained, read_parts(config), lora.alpha / lora.rank)
    return found


def export_lora(run: str | Path, out: str | Path, *, step: int | None = None, which: str = "student") -> int:
    """Writes a LoRA of a run's checkpoint as a file for diffusers and PEFT; returns the checkpoint's step.

    `which` is "student", "ema" (the student's average) or "score", the LoRA on the teacher.
    Raises InputError as `export_checkpoint` does, for a student of which all weights were trained, and where
    the file exists.
    """
    found, trained, config = _read(run, step, which)
    if which != "score" and config.student.mode != "lora":
        raise InputError(
            f"{run} trains all weights of its student, not a LoRA: convert to-diffusers, then extract-lora"
        )
    save_lora(out, trained, config.score.alpha if which == "score" else config.student.lora.alpha)
    return found


def _read(
    run: str | Path, step: int | None, which: str | None
) -> tuple[int, dict[str, np.ndarray], ConfigDict]:
    """Returns a checkpoint's step, one group of its arrays and its configuration."""
    checkpoints = Path(run) / "checkpoints"
    if which is None:
        _, _, manifest = checkpoint.load(checkpoints, step, "step")  # a scalar: only the manifest is wanted
        which = "ema" if manifest.config.get("ema") else "student"
    found, arrays, manifest = checkpoint.load(checkpoints, step, f"{which}.")
    known = flatten(manifest.config)
    if missing := [name for name in _NEEDED if name not in known]:
        raise InputError(f"{checkpoints} is not of a distillation: its config lacks {', '.join(missing)}")
    return found, arrays, ConfigDict(manifest.config)


def _save(directory: Path, trained: Mapping[str, np.ndarray], parts: Parts, lora_scale: float) -> None:
    save_student(
        directory,
        trained,
        base=parts.pipeline,
        config=parts.student.config,
        schedule=parts.student_schedule,
        init=parts.student.directory,
        lora_scale=lora_scale,
    )


def _on_host(params: Params) -> dict[str, np.ndarray]:
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return jax.device_get(params)
