"""The metrics of a run: each step exactly once, whatever interrupted it, and only from the first process."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from sbv2_jax.errors import InputError
from sbv2_jax.run.log import MetricsLog


def lines(workdir: Path) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]


def events(workdir: Path) -> list[tuple[int, str, float]]:
    paths = sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found = [event for path in paths for event in LegacyEventFileLoader(str(path)).Load()]
    return [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]


def record(workdir: Path, first: int, last: int) -> None:
    with MetricsLog(workdir, steps=10, batch_size=4, resume_step=first - 1) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss/vsd": step / 8, "grad_norm/student": 1.0})


def test_every_step_is_one_line_and_one_event(tmp_path):
    record(tmp_path, 1, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[1]["loss/vsd"] == 0.25
    assert all(line["images_per_sec"] > 0 for line in lines(tmp_path))
    assert [(step, value) for step, tag, value in events(tmp_path) if tag == "loss/vsd"] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
    ]


def test_arrays_are_scalars_and_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path, steps=2, batch_size=1) as log:
        log.write(1, {"loss/vsd": jnp.float32(0.5), "loss/clip": jnp.nan, "loss/score": float("-inf")})
    (line,) = lines(tmp_path)
    assert line["loss/vsd"] == 0.5 and line["loss/clip"] is None and line["loss/score"] is None


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsLog(tmp_path, steps=2, batch_size=1) as log:
        log.write(1, {"loss/vsd": 0.5})
        assert len(lines(tmp_path)) == 1


def test_a_resumed_run_has_each_step_once(tmp_path):
    record(tmp_path, 1, 7)
    record(tmp_path, 5, 6)
    record(tmp_path, 6, 9)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    record(tmp_path, 1, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "tail", ['{"step": 4, "loss', "\x00\x00\x00", '{"loss/vsd": 1}\n', "[]\n", "\xff", "\n\n"]
)
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    record(tmp_path, 1, 3)
    with open(tmp_path / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write(tail)
    record(tmp_path, 4, 5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_the_bar_shows_losses_and_speed(tmp_path, capsys):
    record(tmp_path, 1, 10)
    shown = capsys.readouterr().err
    assert "vsd=1.25" in shown and "img/s=" in shown and "10/10" in shown


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    record(tmp_path, 1, 3)
    assert not any(tmp_path.iterdir()) and capsys.readouterr().err == ""


FULL = """
import faulthandler, resource, sys
from sbv2_jax.errors import InputError
from sbv2_jax.run import log
from sbv2_jax.run.log import MetricsLog

faulthandler.dump_traceback_later(60, exit=True)  # a hang is a failure too
if sys.argv[2] == "the events":
    log.open = lambda path, *mode, **how: open("/dev/full" if "tfevents" in str(path) else path, *mode, **how)
try:
    with MetricsLog(sys.argv[1], steps=1000, batch_size=1) as log:
        if sys.argv[2] == "all":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # every write beyond this fails
        for step in range(1, 1000):
            log.write(step, {"loss/vsd": 1.0})
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("full", "why"), [("all", "File too large"), ("the events", "No space left on device")]
)
def test_a_full_disk_is_one_line(tmp_path, full, why):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), full], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == f"cannot write the metrics to {tmp_path}: {why}\n"


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*metrics.jsonl"):
        MetricsLog(tmp_path / "file", steps=1, batch_size=1)


def test_a_run_imports_no_torch():
    # tensorboardX did, where there is one: two seconds of every start, and 175 MB of it.
    said = "import sys, sbv2_jax.run.loop; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
