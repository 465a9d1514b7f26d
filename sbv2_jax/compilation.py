"""The training step as compiled programs, and the cache that keeps them between runs."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from sbv2_jax.assemble import Run
from sbv2_jax.programs import Separate
from sbv2_jax.sharding import Layout, batch_sharding
from sbv2_jax.steps import Batch
from sbv2_jax.train_step import TrainStep, make_train_step

# Stages compile side by side; more at a time would gain little, and each takes gigabytes at SD 2.1's size.
WORKERS = 2


def use_cache() -> None:
    """Keeps compiled programs on the disk, unless JAX was already told where, or not to.

    They go to `$XDG_CACHE_HOME/sbv2_jax` or `~/.cache/sbv2_jax`; JAX's own `JAX_COMPILATION_CACHE_DIR` names
    another place, and `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "sbv2_jax"))


def compile_step(
    config: ConfigDict, run: Run, layout: Layout, programs: Separate | None = None
) -> tuple[TrainStep, Separate]:
    """Compiles the step of a run for its layout, as one program or in stages; returns it and its programs.

    No array is needed: the mesh may be of a topology that is not here.
    """
    programs = programs or Separate(WORKERS)
    make = functools.partial(
        make_train_step,
        run.models,
        run.objective,
        run.student_optimizer,
        run.score_optimizer,
        layout.placement,
    )
    if config.programs == "one":
        placement = layout.placement
        step = functools.partial(
            programs.run, "step", make(), out=(placement.state, placement.whole), donate=(0,)
        )
    else:
        step = make(programs)
    state, frozen = layout.abstract()
    step(state, frozen, abstract_batch(config.batch_size, run, batch_sharding(layout.mesh)))
    programs.compiled()
    return step, programs


def abstract_batch(size: int, run: Run, sharding: NamedSharding | None = None) -> Batch:
    """Returns the shapes of a batch of prompts."""

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), jnp.int32, sharding=sharding)

    towers, clip = run.parts.text_encoders, run.parts.clip
    length = run.parts.text_encoder.config.max_position_embeddings
    text = ids(length) if len(towers) == 1 else ids(len(towers), length)
    return Batch(text, None if clip is None else ids(clip.config.text_config.max_position_embeddings))
