"""Compiles training steps for TPU topologies, row by row, and writes docs/scaling.md's tables from what was found.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from sbv2_jax import cli

_ROWS = cli.define_path("rows", "A .jsonl file of the rows, which is continued.")
_ONLY = flags.DEFINE_string("only", ".*", "A regular expression for the names of the rows to compile.")
_WRITE = cli.define_path("write", "A .md file for the tables; nothing is compiled then.")
_ROW = flags.DEFINE_string("row", None, "Compiles this one row, here.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Programs compiled at a time.", lower_bound=1)


class Row(NamedTuple):
    """A model, pixels a side, where it is compiled for, images of a batch, and devices that share the weights."""

    model: str
    px: int
    topology: str
    batch: int
    fsdp: int


# All weights on one device, with two sizes of a batch; and shared by eight.
MEMORY_ROWS = (
    Row("sd21-base", 512, "v5p:2x2x1", 16, 1),
    Row("sd21-base", 512, "v5p:2x2x1", 64, 1),
    Row("sd21-base", 512, "v5e:2x4", 64, 8),
)
# GB of a device's memory, and the share of it that a program may take.
SIZES, SHARE = (16, 32, 80, 141), 0.95
ONE_BOARD = {"v4:2x2x1": 4, "v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8}
ROWS = [
    # configs/tpu_v4.py, --config.batch_size=128 --config.mesh.fsdp=4, on 8, 32 and 128 chips
    *(Row("sd21-base", 512, topology, 128, 4) for topology in ("v4:2x2x2", "v4:2x4x4", "v4:4x4x8")),
    *MEMORY_ROWS[:2],
    *(Row("sd21-base", 512, topology, 8 * count, count) for topology, count in ONE_BOARD.items()),
    *(Row("sd15", 512, topology, 8 * count, count) for topology, count in ONE_BOARD.items()),
    *(Row("sdxl", 1024, topology, count, count) for topology, count in ONE_BOARD.items()),
]
CHIPS = (8, 32, 128, 512, 4096)
COLUMNS = ("model", "px", "topology", "mesh", "batch", "GiB a device", "of", "fits", "largest in",
           "generate GiB", "TFLOP/image", "moved GiB/step", "est. s/step", "bound", "compile s",
           "host GiB")  # fmt: skip


def name_of(row: Row) -> str:
    """Returns what identifies a row."""
    return " ".join(map(str, row))


def compile_row(row: Row) -> dict[str, Any]:
    """Compiles the step of a row in stages; returns its figures."""
    from sbv2_jax.plan.cost import at_scale, step_time
    from sbv2_jax.plan.plan import compile_for
    from sbv2_jax.run.config import stable_diffusion_21
    from sbv2_jax.tree import GIB

    config = stable_diffusion_21("", {"batch_size": row.batch, "mesh.fsdp": row.fsdp})
    config.update(architecture=row.model, resolution=row.px)
    config.student.init = "teacher"
    start = time.monotonic()
    plan = compile_for(config, row.topology, workers=_WORKERS.value)
    seconds = time.monotonic() - start
    found = {"name": name_of(row), **row._asdict(), "devices": plan.devices}
    found |= {
        "mesh": " x ".join(map(str, plan.mesh.values())),
        "GiB a device": round(plan.peak / GIB, 2),
        "of": round(plan.chip.usable / GIB, 2),
        "fits": "yes" if plan.fits else "no",
        "TFLOP/image": round(plan.flops / row.batch / 1e12, 2),
        "compile s": round(seconds),
        "host GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }
    if plan.programs:
        estimate = step_time(plan)
        found |= {
            "largest in": max(plan.programs, key=lambda name: plan.programs[name].need.total),
            "generate GiB": round(plan.generate.need.total / GIB, 2),
            "moved GiB/step": round(sum(plan.collectives.values()) / GIB, 2),
            "est. s/step": round(estimate.total, 3),
            "bound": estimate.bound,
            "at scale": {
                devices: at_scale(plan, devices).total for devices in CHIPS if devices >= plan.devices
            },
        }
    return found


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
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
        done = subprocess.run([*command, f"--workers={_WORKERS.value}"], check=False)
        if done.returncode:
            print(f"{name_of(row)} failed with exit code {done.returncode}", flush=True)


def table(columns: tuple[str, ...], lines: list[list[Any]]) -> str:
    """Returns a table of Markdown; None is an empty cell."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows
    )


def scaling_lines(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """Yields images/s for each number of chips, and the last's share of perfect scaling."""
    for row in rows:
        if "at scale" not in row or row["devices"] > CHIPS[0]:
            continue
        each = row["batch"] / row["devices"]
        rates = {int(devices): int(devices) * each / seconds for devices, seconds in row["at scale"].items()}
        yield [row["model"], row["px"], row["topology"], f"{each:g}", *(f"{rates[chips]:,.0f}" for chips in CHIPS),
               f"{rates[CHIPS[-1]] / rates[CHIPS[0]] * CHIPS[0] / CHIPS[-1]:.0%}"]  # fmt: skip


def memory_lines(rows: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    """Yields what SD 2.1 takes beside the images and for each, and how many fit, where 1 or 8 share the weights."""
    few, many, shared = (rows.get(name_of(row)) for row in MEMORY_ROWS)
    if not (few and many and shared):
        return
    peak = "GiB a device"
    of_an_image = (many[peak] - few[peak]) / (many["batch"] - few["batch"]) * few["devices"]
    for row in (few, shared):
        fixed = row[peak] - of_an_image * row["batch"] / row["devices"]
        fit = (max(0, int((SHARE * size * 1e9 / 2**30 - fixed) // of_an_image)) for size in SIZES)
        yield [row["fsdp"], f"{fixed:.1f}", f"{of_an_image:.2f}", *(count or "none" for count in fit)]


def filled(text: str, name: str, body: str) -> str:
    """Returns a page with the lines between the marks of this name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    path = Path(_ROWS.value)
    if _ROW.value:
        row = next(row for row in ROWS if name_of(row) == _ROW.value)
        line = json.dumps(compile_row(row))
        print(line, flush=True)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    elif _WRITE.value:
        found = read_rows(path)
        done = [found[name_of(row)] for row in ROWS if name_of(row) in found]
        page = Path(_WRITE.value)
        text = page.read_text(encoding="utf-8")
        text = filled(
            text, "table", table(COLUMNS, [[row.get(column) for column in COLUMNS] for row in done])
        )
        heads = (
            "model",
            "px",
            "compiled for",
            "images a chip",
            *(f"{chips:,} chips" for chips in CHIPS),
            "kept",
        )
        text = filled(text, "scaling", table(heads, list(scaling_lines(done))))
        heads = (
            "devices that share the weights",
            "GiB without images",
            "GiB an image",
            *(f"{size} GB" for size in SIZES),
        )
        page.write_text(filled(text, "memory", table(heads, list(memory_lines(found)))), encoding="utf-8")
    else:
        compile_missing(path, _ONLY.value)


if __name__ == "__main__":
    cli.run(main, required=("rows",))
