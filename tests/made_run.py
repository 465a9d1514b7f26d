"""A run's directory as training would leave it, and the command that converts it."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from forked_commands import ROOT, forks

from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.distill.state import PlayerState, TrainState
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.export import export_student

STEP = 4


class Made(NamedTuple):
    """A run's directory, with checkpoints and the export of the newest one, and what was saved in it."""

    directory: Path
    state: TrainState


def make_run(world: Path, name: str, **changes: object) -> Made:
    """Makes what a run would leave behind, with random arrays in place of trained ones."""
    config = default_config()
    config.teacher = str(world / "pipeline")
    config.score.update(rank=2, alpha=3.0)
    config.student.lora.update(rank=4, alpha=8.0)
    config.update_from_flattened_dict(changes)
    run = assemble(config, read_parts(config))
    rng = np.random.default_rng(len(name))

    def draw(shapes: dict) -> dict:
        return {
            name: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) for name, leaf in shapes.items()
        }

    shapes = run.state_shapes
    student, ema, score = map(draw, (shapes.student, shapes.ema, shapes.players["score"].params))
    state = TrainState(
        step=np.int32(STEP),
        key=np.zeros(2, np.uint32),
        players={"student": PlayerState(student, ()), "score": PlayerState(score, ())},
        ema=ema,
    )
    directory = world / name
    with Checkpoints(directory / "checkpoints", keep=3, config=config.to_dict()) as checkpoints:
        if config.ema:
            checkpoints.save(STEP - 1, jax.tree.map(np.zeros_like, state))
        checkpoints.save(STEP, state)
    export_student(run, state, directory / "export")
    return Made(directory, state)


def command(*arguments: object) -> tuple[int, str, str]:
    """Calls launch/convert.py as a process of its own; returns its exit code, stdout and stderr."""
    process = forks().start(["launch/convert.py", *map(str, arguments)], ROOT)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
