"""The mirror at Weights & Biases, by what it writes when it is offline."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbv2_jax.errors import InputError
from sbv2_jax.generate.pictures import save_png
from sbv2_jax.run.directory import STARTS, sample_path
from sbv2_jax.run.log import MetricsLog
from sbv2_jax.run.wandb_mirror import WandbMirror, require_wandb

_BLOCK, _HEADER = 32768, 7


def records(path: Path):
    """The records of a `.wandb` file: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def history(workdir: Path) -> dict[str, list[dict]]:
    """What was logged, by the run's id, in the order of the runs."""
    found: dict[str, list[dict]] = {}
    for path in sorted(
        (workdir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime
    ):
        rows = found.setdefault(path.stem.removeprefix("run-"), [])
        for record in records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return found


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = tmp_path / "run"
    path.mkdir()
    (path / STARTS).write_text('{"time": "2026-01-01T00:00:00Z"}\n')
    return path


def test_metrics_and_pictures_are_sent_and_a_resumed_run_goes_on_in_the_same(workdir, rng):
    def record(first, last):
        with MetricsLog(
            workdir,
            steps=9,
            batch_size=4,
            resume_step=first - 1,
            mirror=lambda: WandbMirror("world", workdir, {"seed": 0, "batch_size": 4}),
        ) as log:
            for step in range(first, last + 1):
                log.write(step, {"loss/vsd": step / 8})
                if step in (2, 5):  # drawn when its step is logged
                    save_png(sample_path(workdir, step), rng.integers(0, 256, (8, 8, 3), np.uint8))

    record(1, 3)
    (workdir / STARTS).open("a").write('{"time": "2026-01-02T00:00:00Z"}\n')
    record(3, 5)
    found = history(workdir)
    assert len(found) == 1  # one run, whose second part goes on
    (rows,) = found.values()
    losses = [(row["step"], row["loss/vsd"]) for row in rows if "loss/vsd" in row]
    assert losses == [(step, step / 8) for step in (1, 2, 3, 3, 4, 5)]
    assert [row["step"] for row in rows if "samples/path" in row or "samples" in row] == [2, 5]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"sbv2_jax\[wandb\]"):
        require_wandb()


def test_a_run_that_cannot_be_opened_is_one_line(workdir):
    # In a process of its own: the package reads its environment once.
    found = subprocess.run(
        [sys.executable, "-c", OPENED, workdir],
        env=os.environ | {"WANDB_MODE": "online", "WANDB_API_KEY": "short"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.startswith("config.wandb.project=world: ") and "API" in found.stdout
    assert found.stdout.count("\n") == 1


OPENED = """
import sys
from pathlib import Path
from sbv2_jax.errors import InputError
from sbv2_jax.run.wandb_mirror import WandbMirror
try:
    WandbMirror("world", Path(sys.argv[1]), {"seed": 0})
except InputError as error:
    print(error)
"""
