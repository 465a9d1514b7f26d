"""The training command on a tiny pipeline: started, ended, and what it recorded."""

import json
from pathlib import Path

from forked_commands import ROOT, Forked, forks

CONFIG = ROOT / "configs" / "openmoji.py"
STEPS = 6


def fields(world: Path, changes: dict[str, object]) -> dict[str, object]:
    """The tiny run's settings; in a string, {} stands for the world's directory."""
    values = {
        "teacher": "{}/pipeline",
        "prompts": "{}/prompts.txt",
        "steps": STEPS,
        "batch_size": 4,
        "score.rank": 2,
        "score.targets": r".*\.attn[12]\.to_(q|v)",  # its other projections are convolutions
        "ema": 0.9,
        "sample.every": 3,
        "checkpoint.every": 2,
        **changes,
    }
    return {name: value.format(world) if isinstance(value, str) else value for name, value in values.items()}


def command(world: Path, workdir: Path, *flags: str, **changes: object) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in fields(world, changes).items()]
    return ["launch/train.py", f"--config={CONFIG}", f"--workdir={workdir}", *overrides, *flags]


def start(words: list[str]) -> Forked:
    return forks().start(words)


def run(words: list[str]) -> tuple[int, str, str]:
    process = start(words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def lines_of(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in lines_of(workdir)]
