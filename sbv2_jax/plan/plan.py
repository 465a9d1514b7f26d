"""Compiles a run's step for a topology, and measures what it takes there."""

import dataclasses
import functools
import math
import re
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from sbv2_jax.devices.sharding import Layout, bytes_per_device, shardings
from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.errors import InputError
from sbv2_jax.generate import inference
from sbv2_jax.generate.inference import GeneratorParams
from sbv2_jax.plan.flops import count_flops
from sbv2_jax.plan.hlo import Buffer, collective_bytes, largest_arrays
from sbv2_jax.plan.memory import Need, Recorded, needs
from sbv2_jax.plan.topologies import Chip, devices_of
from sbv2_jax.run.batches import abstract_batch
from sbv2_jax.run.build import Run, assemble
from sbv2_jax.run.compilation import compile_step, lay_out
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import validate
from sbv2_jax.run.generators import student_generator
from sbv2_jax.tree import Params, Shapes

# What the compiler says when a program is too large depends on where it noticed.
_TOO_LARGE = re.compile(r"(?:Used |\()([\d.]+)([KMG])(?:\) exceeds available HBM| of [\d.]+[KMG] hbm)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is known of one compiled program, which runs `calls` times in a step.

    `accessed` is the compiler's count of the bytes that its operations read from memory and write to it.
    """

    calls: int
    need: Need
    accessed: float
    collectives: dict[str, int]
    buffers: list[Buffer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step, compiled for a topology: `peak` bytes of a device, of which `chip.usable` may be used.

    Where the compiler gave up there are no `programs`, and `peak` is what it says it would have used.
    `flops` is of the whole step on all devices, `gradient_bytes` of one device's part of the student's gradients.
    `generate` draws one picture on each device, by itself.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    batch_size: int
    flops: float
    gradient_bytes: int
    seconds: float
    peak: float
    programs: dict[str, Program]
    generate: Program | None

    @property
    def fits(self) -> bool:
        """Whether the step runs there."""
        return bool(self.programs) and self.peak <= self.chip.usable

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    @property
    def collectives(self) -> dict[str, int]:
        """The bytes of each kind of collective in one step."""
        totals: Counter[str] = Counter()
        for program in self.programs.values():
            totals.update({kind: program.calls * size for kind, size in program.collectives.items()})
        return dict(totals)


def compile_for(config: ConfigDict, topology: str, *, workers: int = 1, effort: float = -1.0) -> Plan:
    """Compiles the step of a run for a topology, with the published shapes where the teacher is not here.

    `workers` programs compile at a time. `effort`, from -1 to 1, is what the compiler spends on speed: at
    the lowest compiling takes a fifth, a program's temporaries are much the same, and its code is smaller.
    Raises InputError for whatever is wrong with the configuration or the topology.
    """
    validate(config)
    chip, devices = devices_of(topology)
    parts = read_parts(config, dry_run=True)
    config, run, layout = lay_out(config, parts, devices, chip.usable)
    flops = step_flops(config, assemble(config, parts))
    options = {"exec_time_optimization_effort": effort}
    programs = Recorded(workers, options)
    start, peak, found, generate = time.monotonic(), 0.0, {}, None
    try:
        compile_step(config, run, layout, programs)
        generate = _compile_generate(run, layout, Recorded(workers, options))
    except JaxRuntimeError as error:
        peak = wanted_bytes(error)
    else:
        found = _programs(programs, layout.abstract)
        peak = max(program.need.total for program in found.values())
    return Plan(
        topology=topology,
        chip=chip,
        mesh=dict(layout.mesh.shape),
        batch_size=config.batch_size,
        flops=flops,
        gradient_bytes=bytes_per_device(run.state_shapes.student, layout.state.student),
        seconds=time.monotonic() - start,
        peak=peak,
        programs=found,
        generate=generate,
    )


def step_flops(config: ConfigDict, run: Run) -> float:
    """Returns the model FLOPs of one step, recomputation included."""
    step = make_train_step(run.method)
    batch = abstract_batch(config.batch_size, run)
    return count_flops(step, run.state_shapes, run.frozen_shapes, batch)


def _compile_generate(run: Run, layout: Layout[jax.sharding.Mesh], programs: Recorded) -> Program:
    generator, (_, frozen) = student_generator(run), layout.abstract
    batch, whole = layout.placement.batch, layout.placement.whole

    def sharded(shapes: Shapes) -> Params:
        placed = shardings(shapes, layout.mesh)
        return {
            name: jax.ShapeDtypeStruct(  # type: ignore[misc]  # in the place of an array
                leaf.shape, run.compute_dtype, sharding=placed[name]
            )
            for name, leaf in shapes.items()
        }

    params = GeneratorParams(
        sharded(generator.unet.shapes), frozen["text_encoder"], sharded(generator.vae.shapes)
    )
    count = layout.mesh.size
    ids = abstract_batch(count, run, layout.mesh)["input_ids"]
    null_ids = jax.ShapeDtypeStruct(ids.shape[1:], ids.dtype, sharding=whole)

    def noise(*further: int) -> jax.ShapeDtypeStruct:
        shape = (count, *further, *run.method.latent_shape)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch)

    steps = len(run.method.student.timesteps)
    noises = (noise(), noise(steps - 1)) if steps > 1 else (noise(),)
    programs.run(
        "generate",
        functools.partial(inference.generate, generator),
        *(params, ids, null_ids, *noises),
        out=batch,
    )
    return _programs(programs, params)["generate"]


def _programs(programs: Recorded, resident: Any) -> dict[str, Program]:
    found = {}
    wanted = needs(programs, resident)
    calls = Counter(call.name for call in programs.calls)
    for name, compiled in programs.compiled().items():
        text, costs = compiled.as_text(), compiled.cost_analysis()
        if text is None or costs is None:
            raise ValueError(f"the compiler says nothing of its program {name!r}")
        found[name] = Program(
            calls=calls[name],
            need=wanted[name],
            accessed=costs["bytes accessed"],
            collectives=collective_bytes(text),
            buffers=largest_arrays(text, 5),
        )
    return found


def wanted_bytes(error: JaxRuntimeError) -> float:
    """Returns the bytes that the compiler says a program would use; raises what is another error."""
    said = _TOO_LARGE.search(str(error))
    if said is None:
        raise InputError(f"the step does not compile: {str(error).splitlines()[0]}") from error
    return float(said[1]) * _UNITS[said[2]]
