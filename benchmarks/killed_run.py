"""Kills the main job with SIGKILL, runs it again, and compares it with a run that nothing disturbed.

python launch/train.py --config=configs/openmoji.py --workdir=runs/openmoji
python benchmarks/killed_run.py --workdir=runs/killed --undisturbed=runs/openmoji --kill_at=250

Exit code 1 where the last picture, a loss or a tensor of the export differs by a single bit.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from safetensors.numpy import load_file

from sbv2_jax import cli
from sbv2_jax.errors import InputError

_CONFIG = flags.DEFINE_string("config", "configs/openmoji.py", "The run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run that is killed; it may have begun.")
_UNDISTURBED = flags.DEFINE_string("undisturbed", None, "Directory of the same run, complete.")
_KILL_AT = flags.DEFINE_integer("kill_at", 250, "The step after which it is killed.", lower_bound=1)
UNET = "export/unet/diffusion_pytorch_model.safetensors"


def metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the metrics of the steps that are complete in the file."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir: Path) -> int:
    """Returns the number of the last step that was written, or 0."""
    return int(max((line["step"] for line in metrics(workdir)), default=0))


def differences(ours: Path, theirs: Path) -> list[str]:
    """Returns what differs between two complete runs."""
    found = []
    pictures = [sorted((path / "samples").glob("*.png"))[-1] for path in (ours, theirs)]
    if pictures[0].name != pictures[1].name or pictures[0].read_bytes() != pictures[1].read_bytes():
        found.append(f"{pictures[0]} and {pictures[1]}")
    for one, other in zip(metrics(ours), metrics(theirs), strict=True):
        names = [name for name in one if name != "images_per_sec" and one[name] != other[name]]
        found += [f"step {one['step']:.0f}: {name} {one[name]} and {other[name]}" for name in names]
    got, want = load_file(ours / UNET), load_file(theirs / UNET)
    found += [name for name in want if not np.array_equal(got[name], want[name])]
    return found


def main() -> int:
    workdir, undisturbed = Path(_WORKDIR.value), Path(_UNDISTURBED.value)
    if not (undisturbed / UNET).is_file():
        raise InputError(f"--undisturbed: {undisturbed} holds no complete run")
    train = Path(__file__).parent.parent / "launch" / "train.py"
    command = [sys.executable, str(train), f"--config={_CONFIG.value}", f"--workdir={workdir}"]
    process = subprocess.Popen(command)
    while last_step(workdir) < _KILL_AT.value:
        if process.poll() is not None:
            raise InputError(
                f"the run ended before step {_KILL_AT.value}, with exit code {process.returncode}"
            )
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"\nkilled after step {last_step(workdir)}", flush=True)
    subprocess.run(command, check=True)
    found = differences(workdir, undisturbed)
    steps = len(metrics(workdir))
    print("\n".join(found[:20]) or f"equal bit for bit: {steps} steps, the last picture, the export")
    return 1 if found else 0


if __name__ == "__main__":
    cli.run(main, required=("workdir", "undisturbed"))
