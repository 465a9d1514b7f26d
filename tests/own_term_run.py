"""A run with a term from a file outside the package, over eight devices, for `test_own_term.py`: JSON in and out."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (its settings of JAX)
import jax
import numpy as np

import sbv2_jax
from sbv2_jax.checkpoint import load
from sbv2_jax.devices import sharding
from sbv2_jax.run.config import default_config
from sbv2_jax.run.loop import train

STEPS = 4


def make_config(world: Path, term: str, steps: int):
    """A run of a few steps, whose terms are VSD and the one in the file."""
    config = default_config()
    config.update(teacher=str(world / "pipeline"), prompts=str(world / "prompts.txt"), batch_size=8)
    config.update(steps=steps, ema=0.0, terms=("vsd", term))
    config.student.lr = 1e-2
    config.score.update(rank=2, targets=r".*\.attn[12]\.to_(q|v)")
    config.mesh.update(replica=2, data=2, fsdp=2)
    config.checkpoint.every = 2
    config.sample.every = 0
    return config


def main(world: str, term: str) -> None:
    sharding.SMALLEST_SPLIT = 64
    world = Path(world)
    for workdir, lengths in (("straight", (STEPS,)), ("resumed", (2, STEPS))):
        for steps in lengths:
            assert train(make_config(world, term, steps), world / workdir) == 0
    runs = [load(world / name / "checkpoints", None, "") for name in ("straight", "resumed")]
    (first, straight, _), (second, resumed, _) = runs
    lines = [json.loads(line) for line in (world / "resumed" / "metrics.jsonl").read_text().splitlines()]
    pictures = sbv2_jax.load(world / "resumed" / "export").draw(["a dog"])
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "steps": [first, second],
                "same": straight.keys() == resumed.keys()
                and all(np.array_equal(straight[name], resumed[name]) for name in straight),
                "lines": lines,
                "picture": list(pictures.shape),
            }
        )
    )


if __name__ == "__main__":
    main(**json.load(sys.stdin))
