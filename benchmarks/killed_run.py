"""Kills a run with SIGKILL at random moments, runs it again each time, and compares it with an undisturbed one.

python launch/train.py --config=configs/openmoji.py --workdir=runs/openmoji
python benchmarks/killed_run.py --workdir=runs/killed --undisturbed=runs/openmoji --kills=3 --within=400

A hundred kills, of a run of a few minutes:

python launch/train.py --config=configs/openmoji.py:runlocal --config.steps=300 --workdir=runs/short
python benchmarks/killed_run.py --config=configs/openmoji.py:runlocal --set=steps=300 --workdir=runs/killed \
    --undisturbed=runs/short --kills=100 --within=20

Exit code 1 where the last picture, a loss or a tensor of the export differs by a single bit.
"""

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from safetensors.numpy import load_file
from tqdm import tqdm

from sbv2_jax import cli
from sbv2_jax.errors import InputError

_CONFIG = flags.DEFINE_string("config", "configs/openmoji.py", "The run.")
_SET = flags.DEFINE_multi_string(
    "set", [], "FIELD=VALUE of the configuration, as the undisturbed run had it."
)
_WORKDIR = cli.define_path("workdir", "Directory of the run that is killed; it may have begun.")
_UNDISTURBED = cli.define_path("undisturbed", "Directory of the same run, complete.")
_KILLS = flags.DEFINE_integer("kills", 1, "How often it is killed.", lower_bound=1)
_WITHIN = flags.DEFINE_float("within", 60.0, "Seconds after each start in which the moment lies.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
UNET = "export/unet/diffusion_pytorch_model.safetensors"


class Start(NamedTuple):
    """One start of the run: seconds until its first step, and steps that had to be taken again; None if not reached."""

    seconds: float | None
    lost: int | None


def metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the metrics of the steps that are complete in the file."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir: Path) -> int:
    """Returns the number of the last step that was written, or 0."""
    return int(max((line["step"] for line in metrics(workdir)), default=0))


def watch(command: list[str], workdir: Path, seconds: float) -> tuple[Start, bool]:
    """Starts the run and kills it after so many seconds; returns how it started, and whether it ended by itself."""
    path, before = workdir / "metrics.jsonl", last_step(workdir)
    opened = path.stat().st_ino if path.exists() else 0
    begin, restored, first = time.monotonic(), None, None
    with open(workdir.with_suffix(".log"), "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    while process.poll() is None and time.monotonic() - begin < seconds:
        if restored is None and path.exists() and path.stat().st_ino != opened:
            restored = last_step(workdir)  # the file was cut to what had been restored
        elif restored is not None and first is None and last_step(workdir) > restored:
            first = time.monotonic() - begin
        time.sleep(0.02)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    if ended and process.returncode:
        raise InputError(f"the run ended with exit code {process.returncode}: see {log.name}")
    return Start(first, None if restored is None else before - restored), ended


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
    workdir.parent.mkdir(parents=True, exist_ok=True)
    train = Path(__file__).parent.parent / "launch" / "train.py"
    command = [sys.executable, str(train), f"--config={_CONFIG.value}", f"--workdir={workdir}"]
    command += [f"--config.{value}" for value in _SET.value]
    moments, starts = random.Random(_SEED.value), []
    for _ in tqdm(range(_KILLS.value), unit="kill"):
        start, ended = watch(command, workdir, moments.uniform(0, _WITHIN.value))
        if ended:
            raise InputError(
                f"the run ended after {len(starts)} kills: --config.steps or --within is too small"
            )
        starts.append(start)
    start, _ = watch(command, workdir, float("inf"))
    found, steps = differences(workdir, undisturbed), len(metrics(workdir))
    seconds = [one.seconds for one in [*starts, start] if one.seconds is not None]
    lost = [one.lost for one in [*starts, start] if one.lost is not None]
    print(
        f"{len(starts)} kills; {statistics.median(seconds):.1f} s from a start to its first step "
        f"(median of {len(seconds)}, at most {max(seconds):.1f}); {sum(lost)} of {steps} steps taken again, at most "
        f"{max(lost)} after a kill"
    )
    print("\n".join(found[:20]) or f"equal bit for bit: {steps} steps, the last picture, the export")
    return 1 if found else 0


if __name__ == "__main__":
    cli.run(main, required=("workdir", "undisturbed"))
