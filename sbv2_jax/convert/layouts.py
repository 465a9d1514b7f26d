"""A model from one layout of weights into the other: safetensors, as diffusers reads them, and Orbax."""

from pathlib import Path
from typing import Any

from sbv2_jax.convert.formats.component import declared_dtype, load_component, write_component
from sbv2_jax.convert.formats.files import new_directory
from sbv2_jax.convert.formats.pipeline import save_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.side_files import copy_clip_files


def rewrite(model: str | Path, out: str | Path, *, orbax: bool, dtype: Any | None = None) -> None:
    """Writes a pipeline, or a network on its own, with its weights as Orbax checkpoints or as safetensors.

    Names are those of today's libraries; values and types are kept bit for bit unless a `dtype` is asked for,
    and what is no weight is kept too. Raises InputError as `save_pipeline` and `load_component` do; nothing is
    written then.
    """
    directory = resolve(model)
    if (directory / "model_index.json").exists():
        save_pipeline(out, base=directory, orbax=orbax, dtype=dtype)
        return
    component = load_component(directory)
    with new_directory(out) as partial:
        write_component(
            partial,
            component.config,
            component.params,
            dtype=dtype,
            orbax=orbax,
            declared=declared_dtype(directory) if dtype is None else None,
        )
        copy_clip_files(directory, partial)
