"""Compiles training steps for TPU topologies, row by row, and writes docs/scaling.md from what was found.

python benchmarks/scaling_table.py --rows=runs/scaling.jsonl            (hours; goes on where it was interrupted)
python benchmarks/scaling_table.py --rows=runs/scaling.jsonl --only="sd21.*v4:2x2x4"
python benchmarks/scaling_table.py --rows=runs/scaling.jsonl --write=docs/scaling.md

Each row is a process of its own, for a compiler keeps the memory that it once had. Needs libtpu.
"""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from sbv2_jax import cli

_ROWS = flags.DEFINE_string("rows", None, "A .jsonl file of the rows, which is continued.")
_ONLY = flags.DEFINE_string("only", ".*", "A regular expression for the names of the rows to compile.")
_WRITE = flags.DEFINE_string("write", None, "A .md file for the table; nothing is compiled then.")
_ROW = flags.DEFINE_string("row", None, "Compiles this one row, here.")

# (architecture, pixels a side, topology, images of a batch, devices that share out the weights)
GENERATIONS = {"v4:2x2x1": 4, "v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8}
ROWS = [
    *(("sd21-base", 512, topology, 128, 4) for topology in ("v4:2x2x2", "v4:2x4x4", "v4:4x4x8")),
    *(("sd21-base", 512, topology, 8 * count, count) for topology, count in GENERATIONS.items()),
    *(("sd15", 512, topology, 8 * count, count) for topology, count in GENERATIONS.items()),
    *(("sd21", 768, topology, 4 * count, count) for topology, count in GENERATIONS.items()),
    *(("sdxl", 512, topology, 4 * count, count) for topology, count in GENERATIONS.items()),
    *(("sdxl", 1024, topology, count, count) for topology, count in GENERATIONS.items()),
]
COLUMNS = ("model", "px", "topology", "devices", "mesh", "batch", "GiB a device", "of", "fits", "TFLOP/image",
           "moved GiB/step", "est. s/step", "est. images/s", "compile s", "host GiB")  # fmt: skip


def name_of(row: tuple) -> str:
    """Returns what identifies a row."""
    return " ".join(map(str, row))


def compile_row(row: tuple) -> dict:
    """Compiles the step of a row in stages; returns its figures."""
    from sbv2_jax.config import stable_diffusion_21
    from sbv2_jax.plan.cost import step_time
    from sbv2_jax.plan.plan import compile_for
    from sbv2_jax.tree import GIB

    architecture, pixels, topology, batch, fsdp = row
    config = stable_diffusion_21("", {"batch_size": batch, "mesh.fsdp": fsdp})
    config.update(architecture=architecture, resolution=pixels, programs="stages")
    config.student.init = "teacher"
    start = time.monotonic()
    plan = compile_for(config, topology)
    estimate = step_time(plan) if plan.fits else None
    return {
        "name": name_of(row),
        "model": architecture,
        "px": pixels,
        "topology": topology,
        "devices": plan.devices,
        "mesh": "x".join(map(str, plan.mesh.values())),
        "batch": batch,
        "GiB a device": round(plan.peak / GIB, 2),
        "of": round(plan.chip.usable / GIB, 2),
        "fits": "yes" if plan.fits else "no",
        "TFLOP/image": round(plan.flops / batch / 1e12, 2),
        "moved GiB/step": round(sum(plan.collectives.values()) / GIB, 2) if plan.programs else None,
        "est. s/step": round(estimate.total, 3) if estimate else None,
        "est. images/s": round(batch / estimate.total) if estimate else None,
        "compile s": round(time.monotonic() - start),
        "host GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def read_rows(path: Path) -> dict[str, dict]:
    """Returns the rows that are done, by name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def compile_missing(path: Path, only: str) -> None:
    """Compiles each row that is not in the file; one that fails is reported and left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if name_of(row) in read_rows(path) or not re.search(only, name_of(row)):
            continue
        print(f"compiling {name_of(row)}", flush=True)
        command = [sys.executable, __file__, f"--row={name_of(row)}", f"--rows={path}"]
        done = subprocess.run(command, check=False)
        if done.returncode:
            print(f"{name_of(row)} failed with exit code {done.returncode}", flush=True)


def table(rows: list[dict]) -> str:
    """Returns the rows as a table of Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = ("" if row[column] is None else str(row[column]) for column in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    path = Path(_ROWS.value)
    if _ROW.value:
        row = next(row for row in ROWS if name_of(row) == _ROW.value)
        line = json.dumps(compile_row(row))
        print(line, flush=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    elif _WRITE.value:
        done = read_rows(path)
        out = Path(_WRITE.value)
        found = table([done[name_of(row)] for row in ROWS if name_of(row) in done])
        begin, end = "<!-- table -->", "<!-- end -->"
        head, _, rest = out.read_text(encoding="utf-8").partition(begin)
        out.write_text(f"{head}{begin}\n{found}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    else:
        compile_missing(path, _ONLY.value)


if __name__ == "__main__":
    cli.run(main, required=("rows",))
