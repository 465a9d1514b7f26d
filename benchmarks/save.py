"""Measures a save: how long the loop waits for it, how long until it is safe, and what it takes of the host's memory.

python benchmarks/save.py --size=openmoji                (the state of configs/openmoji.py)
python benchmarks/save.py --size=sd21 --every=8          (SD 2.1's real leaves, each eighth of them: 2 GB)
python benchmarks/save.py --size=sd21                    (the whole state: 14 GB, and as much again while it is saved)

Prints one JSON line a figure. Between the saves a step takes the state by donation and gives a new one, as training
does; its values are random, since zeros would be compressed away. The state lies on all devices that are here, with the
weights split over `--fsdp` of them. Peaks are of the resident set, without the state itself where devices have memory
of their own: over the size of what this process holds of the state.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from sbv2_jax import cli
from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.checkpoint.files import file_sizes
from sbv2_jax.devices.sharding import make_mesh, shardings
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import stable_diffusion_21
from sbv2_jax.tree import leaf_names, nbytes

_SIZE = flags.DEFINE_enum("size", "openmoji", ["openmoji", "sd21"], "Whose state.")
_EVERY = flags.DEFINE_integer("every", 1, "Takes each so manieth leaf of the state alone.", lower_bound=1)
_SAVES = flags.DEFINE_integer("saves", 4, "How often; the first is counted apart.", lower_bound=2)
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share the weights.", lower_bound=1)
_DIR = cli.define_path(
    "dir", "Where the checkpoints are written, and deleted; without it, the system's own place."
)


def shapes_of(size: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the leaves of a run's state by name; no weights are read."""
    if size == "openmoji":
        from configs.openmoji import get_config

        config = get_config()
    else:
        config = stable_diffusion_21("", {"batch_size": 1, "mesh.fsdp": 1})
    state = assemble(config, read_parts(config, dry_run=True)).state_shapes
    return dict(zip(leaf_names(state), jax.tree.leaves(state), strict=True))


def made(shapes: dict[str, jax.ShapeDtypeStruct], placed: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns a random state, as the weights of a network compress."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in shapes.items():
        if jax.numpy.issubdtype(shape.dtype, jax.numpy.floating):
            host = (0.02 * rng.standard_normal(shape.shape, np.float32)).astype(shape.dtype)
        else:
            host = np.ones(shape.shape, shape.dtype)
        state[name] = jax.device_put(host, placed[name])
    return jax.block_until_ready(state)


def resident() -> int:
    """Returns the bytes of memory that this process holds."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Gives a dictionary that holds, in the end, by how many bytes the memory rose at most."""
    found, done, start = {"rise": 0}, threading.Event(), resident()

    def watch() -> None:
        while not done.wait(0.005):
            found["rise"] = max(found["rise"], resident() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def say(figure: str, value: float, unit: str, **more: Any) -> None:
    print(json.dumps({"figure": figure, "value": round(value, 3), "unit": unit} | more), flush=True)


def main() -> None:
    every = shapes_of(_SIZE.value)
    shapes = {name: every[name] for name in list(every)[:: _EVERY.value]}
    mesh = make_mesh(1, jax.device_count() // _FSDP.value, _FSDP.value)
    state = made(shapes, shardings(shapes, mesh))
    step = jax.jit(lambda state: {name: leaf * 1 for name, leaf in state.items()}, donate_argnums=0)
    state = jax.block_until_ready(step(state))
    size, device = nbytes(shapes), jax.devices()[0]
    common = {
        "size": _SIZE.value, "leaves": len(shapes), "GB": round(size / 1e9, 3),
        "devices": f"{jax.device_count()} x {device.device_kind}", "fsdp": _FSDP.value,
    }  # fmt: skip
    blocked, safe, busy = [], [], []
    with tempfile.TemporaryDirectory(dir=_DIR.value) as directory, peak() as memory:
        with Checkpoints(directory, keep=1, config={}) as checkpoints:
            for number in range(1, _SAVES.value + 1):
                begin, before = time.perf_counter(), time.process_time()
                checkpoints.save(number, state)
                blocked.append(1e3 * (time.perf_counter() - begin))
                state = jax.block_until_ready(step(state))
                checkpoints.wait()
                safe.append(time.perf_counter() - begin)
                busy.append(time.process_time() - before)
        written = sum(file_sizes(Path(directory)).values())
    for name, values, unit in (
        ("save blocks the loop", blocked, "ms"),
        ("save is safe after", safe, "s"),
        ("save takes of the cores", busy, "s"),
    ):
        say(f"{name}, first", values[0], unit, **common)
        later = {"least": round(min(values[1:]), 3), "most": round(max(values[1:]), 3)}
        say(f"{name}, later", statistics.median(values[1:]), unit, **later, **common)
    say("peak host memory over the state's size", memory["rise"] / size, "times", **common)
    say("bytes written over the state's size", written / size, "times", **common)


if __name__ == "__main__":
    cli.run(main)
