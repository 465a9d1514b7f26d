"""The record of a run's starts, `starts.jsonl`: when, from which step, on which devices, with which versions."""

import datetime
import json
from pathlib import Path

import jax

from sbv2_jax.checkpoint.versions import versions
from sbv2_jax.run.directory import STARTS

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def note_start(workdir: Path, step: int) -> None:
    """Adds this start, from `step`, to the record; called by one process."""
    now = datetime.datetime.now(datetime.UTC)
    start = {
        "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "step": step,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": versions(*_PACKAGES),
    }
    with open(workdir / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
