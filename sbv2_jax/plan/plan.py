"""Compiles a run's step for a topology, and finds what would make it fit where it does not."""

import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from sbv2_jax.assemble import DTYPES, Run, assemble
from sbv2_jax.compilation import abstract_batch, compile_step
from sbv2_jax.config import check_mesh, validate
from sbv2_jax.errors import InputError
from sbv2_jax.memory import fit
from sbv2_jax.models import attention
from sbv2_jax.parts import read_parts
from sbv2_jax.plan.flops import count_flops
from sbv2_jax.plan.hlo import Buffer, collective_bytes, largest_arrays
from sbv2_jax.plan.memory import Need, Recorded, needs
from sbv2_jax.plan.topologies import Chip, devices_of
from sbv2_jax.sharding import Layout, make_mesh
from sbv2_jax.train_step import make_train_step

_TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is known of one compiled program."""

    need: Need
    collectives: dict[str, int]
    buffers: list[Buffer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step, compiled for a topology: `peak` bytes of a device, of which `chip.usable` may be used.

    Where the compiler gave up there are no `programs`, and `peak` is what it says it would have used.
    `flops` is of the whole step on all devices.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    batch_size: int
    flops: float
    seconds: float
    peak: float
    programs: dict[str, Program]

    @property
    def fits(self) -> bool:
        """Whether the step runs there."""
        return bool(self.programs) and self.peak <= self.chip.usable

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        product = 1
        for size in self.mesh.values():
            product *= size
        return product

    @property
    def collectives(self) -> dict[str, int]:
        """The bytes of each kind of collective in one step."""
        totals: dict[str, int] = {}
        for program in self.programs.values():
            for kind, size in program.collectives.items():
                totals[kind] = totals.get(kind, 0) + size
        return totals


def compile_for(config: ConfigDict, topology: str, *, workers: int = 1) -> Plan:
    """Compiles the step of a run for a topology, with the published shapes where the teacher is not here.

    Raises InputError for whatever is wrong with the configuration or the topology.
    """
    validate(config)
    chip, devices = devices_of(topology)
    parts = read_parts(config, dry_run=True)
    config = fit(config, parts, len(devices), chip.usable)
    mesh = make_mesh(*check_mesh(config, len(devices)), devices)
    core = attention.choose(mesh, DTYPES[config.precision]) if config.attention == "auto" else None
    run = assemble(config, parts, core)
    layout = Layout(mesh, config.mesh.rules, run.state_shapes, run.frozen_shapes)
    flops = step_flops(config, assemble(config, parts))
    programs = Recorded(workers)
    start, peak, found = time.monotonic(), 0.0, {}
    try:
        compile_step(config, run, layout, programs)
    except JaxRuntimeError as error:
        peak = _wanted(error)
    else:
        found = _programs(programs, layout.abstract())
        peak = max(program.need.total for program in found.values())
    return Plan(
        topology=topology,
        chip=chip,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        flops=flops,
        seconds=time.monotonic() - start,
        peak=peak,
        programs=found,
    )


def step_flops(config: ConfigDict, run: Run) -> float:
    """Returns the model FLOPs of one step, recomputation included."""
    step = make_train_step(run.models, run.objective, run.student_optimizer, run.score_optimizer)
    batch = abstract_batch(config.batch_size, run)
    return count_flops(step, run.state_shapes, run.frozen_shapes, batch)


def remedies(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Yields, one upon the other, changes of a configuration that take less memory, the cheapest in time first."""
    changes: dict[str, Any] = {}
    if config.remat != "block":
        changes["remat"] = "block"
        yield dict(changes)
    accumulate, fsdp = config.accumulate, max(config.mesh.fsdp, 1)
    most = min(devices // config.mesh.replica, 8 * fsdp)
    while True:
        if 2 * fsdp <= most:
            fsdp *= 2
            changes["mesh.fsdp"] = fsdp
            if config.mesh.data != -1:
                changes["mesh.data"] = devices // (fsdp * config.mesh.replica)
            yield dict(changes)
        elif config.batch_size % (2 * accumulate * devices) == 0:
            accumulate *= 2
            changes["accumulate"] = accumulate
            yield dict(changes)
        else:
            return


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns a copy of a configuration with these fields changed."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy


def _programs(programs: Recorded, resident: Any) -> dict[str, Program]:
    found = {}
    wanted = needs(programs, resident)
    for name, compiled in programs.compiled().items():
        text = compiled.as_text()
        found[name] = Program(
            need=wanted[name], collectives=collective_bytes(text), buffers=largest_arrays(text, 5)
        )
    return found


def _wanted(error: JaxRuntimeError) -> float:
    """Returns the bytes that the compiler says a program would use; raises what is another error."""
    said = _TOO_LARGE.search(str(error))
    if said is None:
        raise InputError(f"the step does not compile: {str(error).splitlines()[0]}") from error
    return float(said[1]) * _UNITS[said[2]]
