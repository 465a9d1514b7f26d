"""Times how long a run takes to its first step, with an empty cache of compiled programs and with a full one.

python benchmarks/warm_start.py --config=configs/tpu_v4.py --config.batch_size=1 \
    --config.mesh.fsdp=1 --config.remat=block

Each start is a process of its own. It reads no weights: the networks have their published shapes, and the step is
compiled for the devices that are here.
"""

import os
import subprocess
import sys
import tempfile
import time

from absl import flags
from ml_collections import config_flags

from sbv2_jax import cli
from sbv2_jax.run.config import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: FILE.py or FILE.py:ARGUMENT.")
_HERE = flags.DEFINE_string("here", None, "Starts once, in this process, with this cache.")


def start(cache: str) -> None:
    """Starts a run as far as its first step, and prints how long each part took."""
    begin = time.perf_counter()
    import jax

    from sbv2_jax.run.compilation import compile_step, lay_out
    from sbv2_jax.run.components import read_parts
    from sbv2_jax.run.memory_estimate import device_memory

    jax.config.update("jax_compilation_cache_dir", cache)
    devices = jax.devices()
    imported = time.perf_counter()
    config = _CONFIG.value
    config, run, layout = lay_out(config, read_parts(config, dry_run=True), devices, device_memory())
    laid_out = time.perf_counter()
    _, programs = compile_step(config, run, layout)
    compiled = time.perf_counter()
    size = sum(entry.stat().st_size for entry in os.scandir(cache)) / 1e6
    print(
        f"{compiled - begin:.1f} s to the first step of {len(devices)} x {devices[0].device_kind}: "
        f"{imported - begin:.1f} s to import, {laid_out - imported:.1f} s to lay out, "
        f"{compiled - laid_out:.1f} s for {len(programs.compiled())} program(s); the cache holds {size:.0f} MB",
        flush=True,
    )


def main() -> int:
    validate(_CONFIG.value)
    if _HERE.value:
        start(_HERE.value)
        return 0
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty", "full"):
            print(f"{name} cache: ", end="", flush=True)
            done = subprocess.run([sys.executable, *sys.argv, f"--here={cache}"], check=False)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    cli.run(main, required=("config",))
