"""A Stable Diffusion or SDXL pipeline by the name that the user gives it: opened, and written."""

from pathlib import Path
from typing import Any

from sbv2_jax.convert.formats.pipeline_directory import (
    PipelineParts,
    component_dir,
    diffusers_arguments,
    one_step_scheduler,
    open_pipeline,
    read_schedule,
    student_scheduler,
    write_pipeline,
)
from sbv2_jax.convert.formats.resolve import is_single_file, resolve
from sbv2_jax.convert.formats.safetensors_io import read_header
from sbv2_jax.errors import InputError

__all__ = [
    "PipelineParts",
    "component_dir",
    "diffusers_arguments",
    "load_pipeline",
    "one_step_scheduler",
    "read_schedule",
    "save_pipeline",
    "student_scheduler",
]


def load_pipeline(path: str | Path, *, dtype: Any | None = None) -> PipelineParts:
    """Opens a pipeline: a directory, a hub id, `bundled` or `FILE.safetensors@BASE` (see `resolve`).

    No weights are read yet. Raises InputError as `resolve` and `pipeline_directory.open_pipeline` do.
    """
    if is_single_file(path):
        read_header(Path(path).expanduser())  # whose error for a pickle is the plainer one
        raise InputError(
            f"{path} has no tokenizer and no scheduler: name the pipeline that has them, as {path}@DIR_OR_ID, or "
            "convert the file (convert.py from-single-file --base=DIR_OR_ID)"
        )
    return open_pipeline(resolve(path), dtype=dtype)


def save_pipeline(directory: str | Path, *, base: str | Path | None = None, **parts: Any) -> None:
    """Writes a pipeline directory, as `pipeline_directory.write_pipeline` does, with the base by its name."""
    write_pipeline(directory, base=None if base is None else load_pipeline(base), **parts)
