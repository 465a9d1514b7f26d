"""Checkpoints of a small state that is a function of the step, and processes that write and read them."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from forked_commands import Forked, forks

from sbv2_jax.checkpoint import Checkpoints

CONFIG = {"steps": 10, "student": {"lr": 1e-6, "targets": ("q", "v")}, "prompts": "p.txt"}


class State(NamedTuple):
    step: jax.Array
    student: dict
    student_opt: tuple


def state_at(step: int) -> State:
    """Returns a state of all the kinds of leaves there are, a function of the step alone."""
    rng = np.random.default_rng(step)
    student = {
        "conv_in.kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 64)), jnp.float32),
        "down_blocks.0.attn1.to_q.kernel": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),
        "down_blocks.0.attn1.to_q.bias": jnp.asarray(rng.normal(size=(64,)), jnp.bfloat16),
    }
    return State(jnp.int32(step), student, optax.adamw(1e-3).init(student))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.tobytes() == theirs.tobytes()


def opened(directory: Path, **changes) -> Checkpoints:
    return Checkpoints(directory, **({"keep": 3, "config": CONFIG, "fingerprint": "abc"} | changes))


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in files_of(directory) if path.name != ".lock"}


def start(script: str, *arguments, devices: int = 1) -> Forked:
    """Starts a Python process that sees this file as `t`."""
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    script = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport made_checkpoints as t\n{script}"
    return forks().start(["-c", script, *map(str, arguments)], environment={"XLA_FLAGS": xla})


def finish(process: Forked) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-3000:]
    return out
