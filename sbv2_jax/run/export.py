"""What a run has trained, from its state or from its checkpoints, in the files of diffusers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from sbv2_jax.checkpoint.manifest import best_step
from sbv2_jax.convert.formats.pipeline import diffusers_arguments, save_pipeline
from sbv2_jax.convert.lora.write import save_lora
from sbv2_jax.convert.model import Model, save_model
from sbv2_jax.devices import processes
from sbv2_jax.diffusion.schedule import FEW_STEPS
from sbv2_jax.distill.state import TrainState
from sbv2_jax.errors import InputError
from sbv2_jax.run.build import Run
from sbv2_jax.run.directory import CHECKPOINTS
from sbv2_jax.run.streamed import serving, streamed
from sbv2_jax.run.trained import kept_student, model_of, read_run, student_of
from sbv2_jax.tree import Params

# For weights of gigabytes, on a slow file system.
_EXPORT_SECONDS = 3600


def export_student(run: Run, state: TrainState, directory: Path) -> None:
    """Writes the student, averaged where the run keeps an average, as a pipeline for its steps in diffusers.

    The other parts are the teacher's. All weights are float32; a LoRA is merged into its base in
    float32. An older export of the same run is replaced. Process 0 writes, and the others wait for it: one that
    ended at once would have the first ended too, after five minutes. Raises InputError, in every process, where it
    cannot be written.
    """
    trained = state.ema or state.student

    def student() -> Model:
        return model_of(
            str(directory),
            streamed(trained),
            run.parts,
            lora_scale=run.method.student.lora_scale,
            side=run.method.latent_shape[0],
            timesteps=run.method.student.timesteps,
        )

    _write_by_one(student, directory, trained)


def export_best(workdir: Path, best: tuple[str, str], directory: Path) -> None:
    """Writes the student of a run's best step, from its checkpoint, as `export_student` does the last one.

    `best` is the name of the figure and its better direction. Raises InputError, in every process, where no step has
    it.
    """

    def student() -> Model:
        step = best_step(workdir / CHECKPOINTS, *best)
        if step is None:
            raise InputError(f"{workdir / CHECKPOINTS} has no step with {best[0]}")
        print(f"export/ is of step {step}, the best by {best[0]}", flush=True)
        return student_of(workdir, step=step)[1]

    _write_by_one(student, directory, {})


def _write_by_one(student: Callable[[], Model], directory: Path, trained: Params) -> None:
    """Has process 0 write a model in the place of an older one, and the others give their parts of what it streams."""
    everyone = set(range(jax.process_count()))
    with processes.together():
        try:
            with serving(trained):
                if jax.process_index() == 0:
                    scratch = directory.with_name(f".{directory.name}.new")
                    shutil.rmtree(scratch, ignore_errors=True)
                    model = student()
                    save_model(scratch, model)
                    shutil.rmtree(directory, ignore_errors=True)
                    scratch.rename(directory)
                    _tell(directory, model)
        finally:
            ocp.multihost.sync_global_processes("exported", timeout=_EXPORT_SECONDS, processes=everyone)


def _tell(directory: str | Path, student: Model) -> None:
    """Says how diffusers draws with a student of other than one step."""
    scheduler = student.scheduler or {}
    if scheduler.get("_class_name") == FEW_STEPS:
        print(f"{directory}: in diffusers, pipe(prompt, {diffusers_arguments(scheduler)})", flush=True)


def export_checkpoint(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    which: str | None = None,
    base: str | None = None,
    init: str | None = None,
    dtype: str | None = None,
) -> int:
    """Writes a model of a run's checkpoint as a pipeline; returns the checkpoint's step.

    Args:
      run: the run's directory, which may be training.
      out: a new or empty directory.
      step: the step to take; without it, the newest one that verifies.
      which: "student" or "ema", which are written as `export_student` does, or "teacher", the pipeline that
        the run distils; without it, the average where the run keeps one.
      base, init: the teacher's pipeline and what the student started from, where they are no longer where the
        run found them.
      dtype: of all weights that are written; without it, float32.

    Raises InputError as `student_of` does; nothing is written then.
    """
    if which == "score":
        raise InputError("--which=score is no student; it can be written as a LoRA file")
    if which == "teacher":
        found, _, config = read_run(run, step, "step")
        save_pipeline(out, base=base or config.teacher, dtype=dtype or "float32")
        return found
    found, student = student_of(run, step=step, which=which, base=base, init=init)
    save_model(out, student, dtype=dtype)
    _tell(out, student)
    return found


def export_lora(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    which: str | None = None,
    file_format: str = "diffusers",
) -> int:
    """Writes a LoRA of a run's checkpoint as a file; returns the checkpoint's step.

    `which` is "student", "ema" (the student's average) or "score", the LoRA on the teacher; without it, the
    average where the run keeps one. `file_format` is explained at `save_lora`.
    Raises InputError as `export_checkpoint` does, for a student of which all weights were trained, and where
    the file exists.
    """
    if which == "teacher":
        raise InputError("--which=teacher is no LoRA; convert to-diffusers writes it")
    if which is None:
        which = kept_student(read_run(run, step, "step")[2])
    found, trained, config = read_run(run, step, f"{which}.")
    if which != "score" and config.student.mode != "lora":
        raise InputError(
            f"{run} trains all weights of its student, not a LoRA: convert to-diffusers, then extract-lora"
        )
    alpha = config.score.alpha if which == "score" else config.student.lora.alpha
    save_lora(out, trained, alpha, file_format=file_format)
    return found
