"""The directory of a run, as it is read: its files' names, lines of JSON, and sample pictures."""

import json
from pathlib import Path
from typing import Any

CONFIG = "config.json"
METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
EXPORT = "export"
CHECKPOINTS = "checkpoints"
PAGE = "report.html"


def is_run(name: str | Path) -> bool:
    """Whether a name is that of a run's directory, and not of a model's."""
    return (Path(name) / CHECKPOINTS).is_dir()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one a line; none where there is no file. A line that is being written, or was
    torn, is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def sample_path(workdir: Path, step: int) -> Path:
    """Returns the path of the grid of a step."""
    return workdir / "samples" / f"step_{step:06d}.png"


def sample_pictures(workdir: Path) -> dict[int, Path]:
    """Returns the grids of a run by step, in ascending order."""
    found = {}
    for path in (workdir / "samples").glob("step_*.png"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))
