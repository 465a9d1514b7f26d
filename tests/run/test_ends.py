"""How a run ends that does not reach its last step: a full disk, Ctrl-C, a hang, a divergence; of real processes."""

import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from tiny_pipeline import write_world
from train_command import ROOT, command, lines_of, metrics, run, start
from train_processes import ended, free_port, launch

from sbv2_jax.checkpoint.files import step_numbers
from sbv2_jax.errors import InputError
from sbv2_jax.run import loop
from sbv2_jax.run.config import default_config
from sbv2_jax.run.guard import MOST_SKIPPED, Guard
from sbv2_jax.run.preemption import EXIT_PREEMPTED
from sbv2_jax.run.watchdog import EXIT_HUNG

pytestmark = pytest.mark.slow

ENDLESS = {"steps": 100_000, "sample.every": 0, "checkpoint.every": 100_000}
SOON = 20.0  # seconds; JAX's own heartbeat needs 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def wait_for(condition, *processes):
    """Waits while all processes live; else none of them is left alive."""
    deadline = time.monotonic() + 240
    while not condition():
        if time.monotonic() > deadline or any(each.poll() is not None for each in processes):
            for each in processes:
                each.kill()
            pytest.fail("\n".join(each.communicate()[1] for each in processes))
        time.sleep(0.01)


@pytest.fixture
def slow_to_compile(monkeypatch, tmp_path):
    """Nothing is found compiled, and all is compiled well."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


# One process cannot write


def test_a_disk_that_fills_up_for_one_process_ends_both_at_once(world, tmp_path):
    started = launch(2, world, tmp_path, **ENDLESS)
    wait_for(lambda: len(lines_of(tmp_path)) >= 2, *started)
    # What /dev/full is to a program that opens it: each later write of this process fails.
    resource.prlimit(started[0].pid, resource.RLIMIT_FSIZE, (64, 64))
    begin = time.monotonic()
    found = ended(started)
    assert time.monotonic() - begin < SOON
    assert [code for code, _ in found] == [2, 2]
    said = f"cannot write the metrics to {tmp_path}: File too large"
    assert [error.splitlines()[-1] for _, error in found] == [f"error: {said}", f"error: process 0: {said}"]


@pytest.mark.parametrize("file", ["samples", "tensorboard", "config.json.tmp"])
def test_what_process_0_cannot_make_ends_both_at_once(world, tmp_path, file):
    """A file where a directory would have to be, or a directory where a file would."""
    (tmp_path / file).mkdir() if file.endswith("tmp") else (tmp_path / file).touch()
    changes = ENDLESS | {"sample.every": 1 if file == "samples" else 0}
    started = launch(2, world, tmp_path, **changes)
    wait_for((tmp_path / "checkpoints" / ".lock").exists, *started)
    found = ended(started)
    assert [code for code, _ in found] == [2, 2], found
    own, others = (error.splitlines()[-1] for _, error in found)
    assert own.startswith("error: cannot write") and str(tmp_path) in own
    assert others == own.replace("error: ", "error: process 0: ", 1)


LONELY = """
import sys, time
from sbv2_jax import cli
from sbv2_jax.devices import processes
from sbv2_jax.errors import InputError
import jax
from jax.experimental import multihost_utils

def main():
    with processes.ending_together():
        multihost_utils.sync_global_devices("start")
        if jax.process_index() == int(sys.argv[3]):
            if sys.argv[4] == "input":
                raise InputError("one has lost its file")
            raise RuntimeError("a bug of one")
        multihost_utils.sync_global_devices("never")

processes.join(sys.argv[1], 2, int(sys.argv[2]))
try:
    sys.exit(main())
except InputError as error:
    cli.fail(str(error))
"""


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(("kind", "code"), [("input", 2), ("bug", 1)])
def test_an_error_that_one_meets_alone_ends_the_other_within_a_collective(failing, kind, code):
    port = free_port()
    started = [start(["-c", LONELY, f"localhost:{port}", str(index), str(failing), kind]) for index in (0, 1)]
    begin = time.monotonic()
    found = ended(started)
    assert time.monotonic() - begin < 2 * SOON
    assert [each for each, _ in found] == [code, code], found
    message = "one has lost its file" if kind == "input" else "a bug of one"
    assert f"error: process {failing}: {message}" in found[1 - failing][1]
    assert message in found[failing][1]


# Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_the_run_at_once_and_says_so(world, tmp_path, slow_to_compile, number):
    process = start(command(world, tmp_path / "run", **ENDLESS))
    wait_for((tmp_path / "run" / "config.json").exists, process)
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - begin < 3
    assert "compiled the step" not in out and not lines_of(tmp_path / "run")
    assert process.returncode == EXIT_PREEMPTED
    assert error.splitlines()[-1] == (
        f"stopped by {signal.Signals(number).name} before the first step: nothing is lost, run the same command to "
        "go on"
    )


@pytest.mark.parametrize("who", [0, 1])
def test_ctrl_c_to_one_of_two_while_compiling_ends_both(world, tmp_path, slow_to_compile, who):
    started = launch(2, world, tmp_path / "run", **ENDLESS)
    wait_for((tmp_path / "run" / "config.json").exists, *started)
    begin = time.monotonic()
    started[who].send_signal(signal.SIGINT)
    found = ended(started)
    assert time.monotonic() - begin < SOON
    assert [code for code, _ in found] == [EXIT_PREEMPTED] * 2, found
    assert all("before the first step" in error.splitlines()[-1] for _, error in found)
    assert not lines_of(tmp_path / "run")


def test_ctrl_c_to_one_of_two_finishes_the_step_and_saves_it(world, tmp_path):
    started = launch(2, world, tmp_path, **ENDLESS)
    wait_for(lambda: len(lines_of(tmp_path)) >= 2, *started)
    started[1].send_signal(signal.SIGINT)
    found = ended(started)
    assert [code for code, _ in found] == [EXIT_PREEMPTED] * 2, found
    assert step_numbers(tmp_path / "checkpoints") == [metrics(tmp_path)[-1]["step"]]


# A hang


def test_a_step_that_hangs_dumps_its_stacks(world, tmp_path):
    """The other process is stopped, so that a collective waits for it."""
    started = launch(2, world, tmp_path, **ENDLESS, **{"limits.step_seconds": 6})
    try:
        wait_for(lambda: len(lines_of(tmp_path)) >= 2, *started)
        started[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        _, error = started[0].communicate(timeout=60)
        assert 4 < time.monotonic() - begin < 6 + SOON
        assert started[0].returncode == EXIT_HUNG
        assert "most recent call first" in error and "run/loop.py" in error
        assert "config.limits.step_seconds = 6" in error.splitlines()[-1]
    finally:
        started[1].kill()
        started[1].communicate()


QUICK = """
import sys, time
from sbv2_jax.run.watchdog import watchdog
with watchdog(1, 30):
    pass
with watchdog(2, 0):
    time.sleep(1)
print("alive", flush=True)
with watchdog(3, 0.5):
    time.sleep(60)
"""


def test_a_watchdog_bites_only_the_step_that_it_is_of():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", QUICK], capture_output=True, text=True, timeout=50, env=environment
    )
    assert done.returncode == EXIT_HUNG and done.stdout == "alive\n"
    assert "error: step 3 took longer than config.limits.step_seconds = 0.5" in done.stderr


# A divergence


def test_a_run_that_diverges_while_finite_stops_and_keeps_what_was_good(world, tmp_path):
    changes = {"steps": 60, "sample.every": 0, "checkpoint.every": 1, "student.lr": 0.01}
    changes["optimizer.schedule"] = "constant"
    code, _, error = run(command(world, tmp_path, **changes, **{"limits.latents_std": 25.0}))
    last = len(metrics(tmp_path))
    assert code == 2 and re.fullmatch(
        rf"error: latents/std = \d.* after step {last} is above config.limits.latents_std = 25: .*",
        error.splitlines()[-1],
    )
    assert step_numbers(tmp_path / "checkpoints")[-1] == last - 1 > 0
    assert not (tmp_path / "export").exists()
    # Without the limit it goes on from what was kept: the first samples are below it, the next ones are not.
    code, _, error = run(
        command(world, tmp_path, **changes | {"steps": last + 1}, **{"limits.latents_std": 0.0})
    )
    assert code == 0, error
    deviations = [line["latents/std"] for line in metrics(tmp_path)]
    assert all(each <= 25 for each in deviations[:last]) and deviations[last] > 25


def test_a_last_step_that_is_beyond_the_limit_is_neither_saved_nor_exported(world, tmp_path):
    """No step comes after it, of which `latents/std` would tell."""
    changes = {"steps": 1, "sample.every": 0, "student.lr": 1.0, "optimizer.schedule": "constant"}
    code, _, error = run(command(world, tmp_path, **changes, **{"limits.latents_std": 25.0}))
    assert code == 2 and " after step 1 is above" in error.splitlines()[-1]
    assert metrics(tmp_path)[0]["latents/std"] <= 25 and not step_numbers(tmp_path / "checkpoints")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("every", [1, 100])
def test_a_state_that_is_not_finite_is_neither_kept_nor_exported(world, tmp_path, monkeypatch, every):
    """An infinity in the average alone, of which no loss tells: it is found beside the steps, or after the last."""
    made = loop.load_state

    def with_infinity(*arguments):
        state = made(*arguments)
        name = sorted(state.ema)[3]
        state.ema[name] = state.ema[name].at[0].set(float("inf"))
        return state

    monkeypatch.setattr(loop, "load_state", with_infinity)
    config = default_config()
    config.update(teacher=f"{world}/pipeline", prompts=f"{world}/prompts.txt", batch_size=2, steps=4, ema=0.9)
    config.update_from_flattened_dict({"sample.every": 0, "checkpoint.every": every, "score.rank": 2})
    with pytest.raises(
        InputError, match=f"^step {min(every, 4)} is not saved: NaN or Inf in 1 leaves: ema\\."
    ):
        loop.train(config, tmp_path)
    assert not step_numbers(tmp_path / "checkpoints") and not (tmp_path / "export").exists()
    assert len(metrics(tmp_path)) <= 4


def test_the_guard_counts_steps_in_a_row_and_takes_any_deviation_without_a_limit():
    guard = Guard("here")
    good, bad = {"skipped": 0.0, "latents/std": 1e30}, {"skipped": 1.0, "latents/std": float("nan")}
    for _ in range(2):
        for step in range(MOST_SKIPPED - 1):
            guard.check(step, bad)
        guard.check(MOST_SKIPPED, good)
    with pytest.raises(InputError, match="not finite in 20 steps in a row, up to step 19.*kept in here"):
        for step in range(MOST_SKIPPED):
            guard.check(step, bad)
    Guard("here", 2.0).check(1, {"skipped": 1.0, "latents/std": float("nan")})
    with pytest.raises(InputError, match=r"latents/std = 2.5 at step 7 is above .* = 2"):
        Guard("here", 2.0).check(7, {"skipped": 0.0, "latents/std": 2.5})
