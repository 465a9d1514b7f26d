"""A run laid out on its devices, and its training step as compiled programs."""

import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sbv2_jax.devices.programs import Separate
from sbv2_jax.devices.sharding import Layout, make_mesh
from sbv2_jax.distill.train_step import TrainStep, make_train_step
from sbv2_jax.models import attention
from sbv2_jax.run.batches import abstract_batch
from sbv2_jax.run.build import DTYPES, Run, assemble
from sbv2_jax.run.components import Parts
from sbv2_jax.run.config import check_mesh
from sbv2_jax.run.memory_estimate import fit

# Stages compile side by side; more at a time would gain little, and each takes gigabytes at SD 2.1's size.
WORKERS = 2


def lay_out(
    config: ConfigDict, parts: Parts, devices: Sequence[jax.Device], memory: float | None, beside: float = 0
) -> tuple[ConfigDict, Run, Layout[Mesh]]:
    """Returns the configuration with nothing left open, and the networks and the layout of its run.

    `memory` is that of one device in bytes, or None where it is not known; `beside` as in `fit`.
    Raises InputError where the run cannot be laid out on these devices.
    """
    config = fit(config, parts, len(devices), memory, beside)
    mesh = make_mesh(*check_mesh(config, len(devices)), devices)
    core = attention.choose(mesh, DTYPES[config.precision]) if config.attention == "auto" else None
    run = assemble(config, parts, core)
    return config, run, Layout(mesh, config.mesh.rules, run.state_shapes, run.frozen_shapes)


def compile_step(
    config: ConfigDict, run: Run, layout: Layout[Mesh], programs: Separate | None = None
) -> tuple[TrainStep, Separate]:
    """Compiles the step of a run for its layout, as one program or in stages; returns it and its programs.

    No array is needed: the mesh may be of a topology that is not here.
    """
    step, programs = begin_step(config, run, layout, programs)
    programs.compiled()
    return step, programs


def begin_step(
    config: ConfigDict, run: Run, layout: Layout[Mesh], programs: Separate | None = None
) -> tuple[TrainStep, Separate]:
    """Begins what `compile_step` does: the programs are compiled beside what follows, until `compiled()` of them."""
    programs = programs or Separate(WORKERS)
    make = functools.partial(
        make_train_step,
        run.method,
        layout.placement,
    )
    step: TrainStep
    if config.programs == "one":
        placement = layout.placement
        step = functools.partial(
            programs.run, "step", make(), out=(placement.state, placement.whole), donate=(0,)
        )
    else:
        step = make(programs)
    step(*layout.abstract, abstract_batch(config.batch_size, run, layout.mesh))
    return step, programs
