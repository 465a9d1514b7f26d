"""The mirror at Weights & Biases, by what it writes when it is offline."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import write_world
from train_command import command, run

from sbv2_jax.errors import InputError
from sbv2_jax.generate.pictures import save_png
from sbv2_jax.run.directory import sample_path
from sbv2_jax.run.log import MetricsLog
from sbv2_jax.run.wandb_mirror import WandbMirror, log_in

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
    return path


def record(workdir, first, last, rng):
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


def test_metrics_and_pictures_are_sent_and_a_resumed_run_goes_on_in_the_same(workdir, rng):
    record(workdir, 1, 3, rng)
    record(workdir, 3, 5, rng)
    found = history(workdir)
    assert len(found) == 1  # one run, whose second part goes on
    (rows,) = found.values()
    losses = [(row["step"], row["loss/vsd"]) for row in rows if "loss/vsd" in row]
    assert losses == [(step, step / 8) for step in (1, 2, 3, 3, 4, 5)]
    assert [row["step"] for row in rows if "samples/path" in row or "samples" in row] == [2, 5]


def test_runs_that_begin_in_one_moment_with_the_same_settings_are_two(workdir, rng):
    other = workdir.parent / "other" / "run"
    other.mkdir(parents=True)
    for each in (workdir, other):
        record(each, 1, 1, rng)
    assert not history(workdir).keys() & history(other).keys()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"config.wandb.project=world: .*sbv2_jax\[wandb\]"):
        log_in("world")


def test_without_a_key_it_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    write_world(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # in which no key lies
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    code, _, error = run(command(tmp_path, tmp_path / "run", **{"wandb.project": "world"}))
    assert code == 2 and error.splitlines()[-1].startswith("error: config.wandb.project=world: No API key")
    assert not (tmp_path / "run").exists()
