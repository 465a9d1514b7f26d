"""Several processes of the real command on one machine, over gloo, against one process."""

import shutil
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file
from tiny_pipeline import write_world
from train_command import metrics
from train_processes import ended, launch

from sbv2_jax import checkpoint
from sbv2_jax.checkpoint.files import step_numbers
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.devices import processes
from sbv2_jax.devices.processes import join
from sbv2_jax.errors import InputError
from sbv2_jax.run.preemption import EXIT_PREEMPTED, Preemption

pytestmark = pytest.mark.slow

SMALL = {"steps": 3, "sample.every": 0, "checkpoint.every": 3, "score.updates_per_step": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    [(code, error)] = ended(launch(1, world, workdir, **SMALL | {"checkpoint.every": 1}))
    assert code == 0, error
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_run_of_one(world, alone, tmp_path, count):
    """Weights are split over the two processes, or over two of the four, which repeat them."""
    pictures = {"sample.every": 3} if count == 2 else {}
    mesh = {"mesh.replica": count // 2, "mesh.fsdp": 2}
    for code, error in ended(launch(count, world, tmp_path, **SMALL | pictures | mesh)):
        assert code == 0, error
    ours, theirs = metrics(tmp_path), metrics(alone)
    assert [line["step"] for line in ours] == [1, 2, 3], "one process writes, each step once"
    for line, want in zip(ours, theirs, strict=True):
        for name in want.keys() - {"images_per_sec", "skipped", "seconds_per_step", "memory/host_gib"}:
            assert line[name] == pytest.approx(want[name], rel=2e-4), name
    got, want, start = (
        load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
        for path in (tmp_path / "export", alone / "export", world / "pipeline")
    )
    assert got.keys() == want.keys() == start.keys()
    # Adam makes a whole step of a gradient that is nothing but rounding: leaves are compared, not elements.
    for name in want:
        way = np.linalg.norm(want[name] - start[name])
        assert np.linalg.norm(got[name] - want[name]) < 1e-2 * way, name
    assert (tmp_path / "samples" / "step_000003.png").is_file() == bool(pictures)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Has the processes not know the tests' cache; returns the user's."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sbv2_jax"


def test_what_fails_for_one_process_fails_for_all(world, tmp_path, own_cache):
    found = ended(launch(2, world, tmp_path / "run", **SMALL, prompts=["{}/prompts.txt", "{}/missing.txt"]))
    assert [code for code, _ in found] == [2, 2]
    assert "missing.txt" in found[1][1].splitlines()[-1]
    assert found[0][1].splitlines()[-1].startswith("error: process 1: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error", [InputError("a wrong field"), OSError(28, "No space left on device", "run")]
)
def test_the_others_are_told_of_what_the_system_refuses_too(monkeypatch, error):
    told = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(processes, "_shared", lambda text: told.append(text) or [text, ""])
    with pytest.raises(type(error)), processes.together():
        raise error
    assert told == [str(error)]


def test_another_configuration_of_a_process_is_refused(world, tmp_path):
    found = ended(launch(2, world, tmp_path / "run", **SMALL, **{"student.lr": [1e-4, 2e-4]}))
    for code, error in found:
        assert code == 2
        assert error.splitlines()[-1] == "error: the configuration of process(es) 1 is not that of process 0"


def test_a_directory_that_is_not_shared_is_refused(world, tmp_path):
    found = ended(launch(2, world, [tmp_path / "here", tmp_path / "there"], **SMALL))
    assert [code for code, _ in found] == [2, 2]
    for (_, error), own in zip(found, ("here", "there"), strict=True):
        assert f"{own} of process(es) 1 is not that of process 0" in error.splitlines()[-1]
    assert not (tmp_path / "there").exists() and not list((tmp_path / "here").glob(".seen*"))


def test_processes_fall_back_together_where_shards_are_damaged(world, alone, tmp_path):
    """To the same step, and on to its export."""
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "3" / "state").rglob("d/*"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    again = SMALL | {"steps": 2, "optimizer.schedule": "constant", "mesh.fsdp": 2}
    for code, error in ended(launch(2, world, tmp_path, "--force", **again)):
        assert code == 0, error
        assert "skipped checkpoint" in error
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    _, want, _ = checkpoint.load(alone / "checkpoints", 2, "ema.")
    got = load_component(tmp_path / "export" / "unet").params
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_sigterm_to_one_process_stops_all_after_one_step(world, alone, tmp_path, own_cache):
    """Of a resumed run, and before its first step: what it compiles is in the directory of both, and nowhere else."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    endless = SMALL | {"steps": 100_000, "optimizer.schedule": "constant"}
    started = launch(2, world, run, "--force", **endless)
    assert started[0].stdout.readline() == "2 processes, 2 devices\n"
    started[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in ended(started)] == [EXIT_PREEMPTED] * 2
    last = metrics(run)[-1]["step"]
    assert 4 <= last < 100 and step_numbers(run / "checkpoints")[-1] == last
    kept = list((run / "compiled").glob("jit_train_step-*-cache"))
    assert len(kept) == 1 and not own_cache.exists()


def test_steps_are_counted_from_the_start_of_the_process(monkeypatch):
    """XLA stops at the count after the largest that it was told: at 1, of a SIGTERM before the first step."""
    told, stop_at = [], 1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda count: told.append(count) or count == stop_at
    )
    with Preemption() as preemption:
        assert preemption.requested() and preemption.requested()
    assert told == [1]
    told, stop_at = [], 4
    with Preemption() as preemption:
        assert [preemption.requested() for _ in range(4)] == [False, False, False, True]
    assert told == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("localhost:1234", 2, None), "--coordinator, --num_processes also needs --process_id"),
        ((None, None, 0), "--process_id also needs --coordinator, --num_processes"),
        (("localhost:1234", 2, 2), "--process_id=2 is not below --num_processes=2"),
    ],
)
def test_flags_that_do_not_go_together(arguments, says):
    with pytest.raises(InputError, match=says):
        join(*arguments)
