"""What is kept of a rung: a small file of its figures, and whether it is of this teacher and this recipe."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sbv2_jax.convert.formats.files import read_json, replaced_file
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.errors import InputError
from sbv2_jax.openmoji.ladder.rungs import ROOT
from sbv2_jax.run.directory import METRICS, STARTS, json_lines

_SETTLED = 50  # of the last steps, `latents/std` is the mean
_DIGITS = 6
# What a result was made of, and what is said where it is another.
_OTHERS = {
    "bundle": "of another teacher",
    "sweep": "of another sweep",
    "rival": "against another setting of the teacher",
    "count": "of another number of pictures",
    "recipe": "of another recipe",
}


def bundle_digest() -> str:
    """Returns one SHA-256 over the files of the bundled pipeline that a run reads."""
    directory, total = resolve("bundled"), hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".json", ".txt", ".safetensors"):
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(directory).as_posix()} {own}\n".encode())
    return total.hexdigest()


def read(path: Path) -> dict[str, Any] | None:
    """Returns a result, or None where there is none; raises InputError for a file that is not one."""
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found.get("made_of"), dict):
        raise InputError(f"{path} is not what benchmarks/ladder.py keeps: remove it")
    return found


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a result, its lists of numbers on a line each, in one rename."""
    # What it was made of is compared, not read.
    rounded = {name: value if name == "made_of" else _rounded(value) for name, value in values.items()}
    text = json.dumps(rounded, indent=1, ensure_ascii=False)
    text = re.sub(r"\[([^][{}\"]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def stale(result: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Returns why a result does not count for what is wanted of it now; empty where it does."""
    return next(
        (said for name, said in _OTHERS.items() if result["made_of"].get(name) != wanted.get(name)), ""
    )


def compact(interval: Mapping[str, float | None]) -> list[float | None]:
    """Returns an interval of a report as [value, low, high]."""
    return [interval["value"], interval["low"], interval["high"]]


def compared(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is kept of a report of the rival and one model: the model's rows, and what the rule is about."""
    (comparison,) = report["comparisons"]
    rule = report["rule"]
    names = [(label, figure) for part in rule.values() for label, own in part.items() for figure in own]
    differences: dict[str, dict[str, Any]] = {}
    for label, figure in names:
        found = comparison["differences"][label][figure]
        differences.setdefault(label, {})[figure] = [compact(one) for one in found]
    model = [row for row in report["sources"] if row["name"] == comparison["name"]]
    return {
        "rows": kept_rows(model),
        "rule": rule,
        "differences": differences,
        "verdict": comparison["verdict"],
    }


def kept_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns what is kept of the rows of a report."""
    return [
        {
            "settings": {
                name: value for name, value in row["settings"].items() if name not in ("model", "pictures")
            },
            "forwards": row["forwards"],
            "figures": {
                label: {figure: compact(one) for figure, one in own.items()}
                for label, own in row["figures"].items()
            },
        }
        for row in rows
    ]


def trained(runs: Sequence[Path]) -> dict[str, Any]:
    """Returns what runs tell of their training: minutes of all their steps, and MiB of their directories; of the last
    one `latents/std` at its end."""
    lines = [json_lines(run / METRICS) for run in runs]
    seconds = sum(line["seconds_per_step"] for own in lines for line in own)
    held = sum(path.stat().st_size for run in runs for path in run.rglob("*") if path.is_file())
    settled = [line["latents/std"] for line in lines[-1][-_SETTLED:] if line["latents/std"] is not None]
    return {
        "minutes": seconds / 60,
        "latents/std": fmean(settled) if settled else None,
        "mib": held / 2**20,
    }


def machine_of(run: Path) -> str:
    """Returns what a run was on: its accelerator, or the processor here."""
    starts = json_lines(run / STARTS)
    device = starts[-1]["device"] if starts else "cpu"
    return device if device.lower() != "cpu" else processor()


def processor() -> str:
    """Returns the cores and the name of the processor here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return (
        f"{os.cpu_count()} cores, {names[0].strip() if names else platform.processor() or platform.machine()}"
    )


def commit() -> str | None:
    """Returns the commit of the checkout, with a + where the code was changed since; None outside of git."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    if shutil.which("git") is None:
        return None
    head = git("rev-parse", "HEAD")
    if head.returncode:
        return None
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode
    return head.stdout.strip() + "+" * bool(changed)


def _rounded(value: Any) -> Any:
    """Returns a value with its floats to as many digits as anyone reads."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
