"""Whole runs of the real command on a tiny pipeline: killed, resumed, exported, and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from forked_commands import Forked
from parity import nchw
from PIL import Image
from tiny_pipeline import write_world
from train_command import CONFIG, ROOT, STEPS, command, fields, lines_of, metrics, run, start

import sbv2_jax
from sbv2_jax import checkpoint
from sbv2_jax.checkpoint.files import discard
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.errors import InputError
from sbv2_jax.fields import load
from sbv2_jax.models import lora
from sbv2_jax.run.loop import train
from sbv2_jax.run.preemption import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

LORA = {
    "student.mode": "lora",
    "student.lora.rank": 2,
    "student.lora.alpha": 4.0,
    "clip.model": "{}/pipeline",
    "clip.weight": 0.5,
    "clip.tau": 0.9,
    "ema": 0.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a pipeline and prompts."""
    return write_world(tmp_path_factory.mktemp("world"))


def stop_after(process: Forked, workdir: Path, step: int, how: int) -> tuple[str, str]:
    """Sends a signal once the run has recorded a step; the run must still be going."""
    deadline = time.monotonic() + 240
    while len(lines_of(workdir)) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(how)
    return process.communicate(timeout=120)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The run that nothing disturbed, all weights of the student trained; started as a shell does."""
    workdir = tmp_path_factory.mktemp("straight")
    done = subprocess.run(
        [sys.executable, *command(world, workdir)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_a_run_leaves_the_files_that_it_promises(straight):
    workdir, out = straight
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["loss/vsd"] > 0 and line["loss/score"] > 0 and line["images_per_sec"] > 0
        assert line["lr/student"] > 0 and line["lr/score"] > 0 and "clip/weight" not in line
        since_the_last = 4 / line["images_per_sec"]  # seconds, with saves and pictures
        assert 0 < line["seconds_per_step"] <= since_the_last * (1 + 1e-9) and line["memory/host_gib"] > 0.1
        assert line["grad_norm/student"] > 0 and line["grad_norm/score"] > 0 and line["skipped"] == 0
    pictures = [f"step_{step:06d}.png" for step in (0, 3, 6)]
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == [".teacher.npz", *pictures]
    assert "6 of 6 steps. Its export is written." in (workdir / "report.html").read_text()
    assert json.loads((workdir / "starts.jsonl").read_text())["step"] == 0
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 4
    assert list((workdir / "tensorboard").iterdir())
    assert f"--model={workdir / 'export'}" in out
    before, after = (np.asarray(Image.open(workdir / f"samples/step_00000{step}.png")) for step in (0, 6))
    assert before.shape == after.shape and (before != after).any()


def test_a_killed_run_goes_on_to_the_same_bits(world, straight, tmp_path):
    process = start(command(world, tmp_path))
    stop_after(process, tmp_path, 3, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    code, _, err = run(command(world, tmp_path))
    assert code == 0, err
    want_step, want, _ = checkpoint.load(straight[0] / "checkpoints")
    step, got, _ = checkpoint.load(tmp_path / "checkpoints")
    assert step == want_step == STEPS
    assert got.keys() == want.keys()
    assert [name for name in want if not np.array_equal(got[name], want[name])] == []
    last = f"samples/step_{STEPS:06d}.png"
    assert (tmp_path / last).read_bytes() == (straight[0] / last).read_bytes()
    assert [line["loss/vsd"] for line in metrics(tmp_path)] == [
        line["loss/vsd"] for line in metrics(straight[0])
    ]


def test_a_run_of_several_score_updates_goes_on_to_the_same_bits(world, tmp_path):
    """Every update's prompts and random numbers are those of its step, wherever the run was taken up again."""
    changes = {"steps": 4, "score.updates_per_step": 3, "vsd.guidance": "(0.5, 2.0)", "sample.every": 0}
    code, _, err = run(command(world, tmp_path / "straight", **changes))
    assert code == 0, err
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    discard(tmp_path / "again" / "checkpoints", 4)
    code, _, err = run(command(world, tmp_path / "again", **changes))
    assert code == 0, err
    losses = [[line["loss/score"] for line in metrics(tmp_path / name)] for name in ("straight", "again")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    (_, want, _), (_, got, _) = (
        checkpoint.load(tmp_path / name / "checkpoints") for name in ("straight", "again")
    )
    assert want["score_opt.1.0.count"] == 12
    assert [name for name in want if not np.array_equal(got[name], want[name])] == []


def test_sigterm_saves_the_step_and_says_so_by_its_exit_code(world, tmp_path):
    process = start(command(world, tmp_path, **{"steps": 1000, "sample.every": 0, "checkpoint.every": 1000}))
    _, err = stop_after(process, tmp_path, 2, signal.SIGTERM)
    assert process.returncode == EXIT_PREEMPTED, err
    assert "run the same command to go on" in err
    step, _, _ = checkpoint.load(tmp_path / "checkpoints")
    assert step == len(metrics(tmp_path)) >= 2


def test_export_draws_the_same_picture_in_diffusers(straight, rng):
    export = straight[0] / "export"
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    theirs = DiffusionPipeline.from_pretrained(export)
    theirs.set_progress_bar_config(disable=True)
    want = theirs(
        ["a red apple", "dog"],
        latents=nchw(noise),
        num_inference_steps=1,
        guidance_scale=0,
        output_type="np",
    ).images
    got = sbv2_jax.load(export).draw(["a red apple", "dog"], noise=noise)
    assert got.std() > 20
    assert np.abs(got / 255.0 - want).max() < 2 / 255
    _, trained, _ = checkpoint.load(straight[0] / "checkpoints", prefix="ema.")
    exported = load_component(export / "unet").params
    assert [name for name in exported if not np.array_equal(exported[name], trained[name])] == []


def test_lora_with_clip_and_reward_trains_and_exports_merged_weights(world, tmp_path):
    reward = {"terms": ("vsd", "clip", "reward"), "reward.model": "{}/pipeline", "reward.weight": 0.25}
    reward |= {"reward.schedule": "constant"}
    code, out, err = run(command(world, tmp_path, **LORA, **reward, **{"sample.every": 0, "accumulate": 2}))
    assert code == 0, err
    assert out.splitlines()[0].startswith("compiling: a minute or more the first time")
    lines = metrics(tmp_path)
    assert all(line["reward/weight"] == 0.25 for line in lines)
    assert all(line["reward/cosine"] == pytest.approx(line["clip/cosine"], abs=1e-6) for line in lines)
    assert all(0 < line["loss/clip"] < 2 for line in lines)
    assert [line["clip/weight"] for line in lines] == pytest.approx(
        [0.5 * (1 - step / STEPS) for step in range(STEPS)]
    )
    assert all(line["clip/clamped"] in (0, 0.25, 0.5, 0.75) for line in lines)
    _, trained, manifest = checkpoint.load(tmp_path / "checkpoints", prefix="student.")
    assert all(lora.is_lora(name) for name in trained)
    assert manifest.config["student"]["mode"] == "lora"
    base = load_component(world / "pipeline" / "unet").params
    want = lora.merge(base, trained, 4.0 / 2)
    exported = load_component(tmp_path / "export" / "unet").params
    assert [name for name in want if not np.array_equal(exported[name], want[name])] == []
    changed = [name for name in want if not np.array_equal(exported[name], base[name])]
    assert changed and all(".attn" in name for name in changed)


def test_dry_run_of_sd21_counts_and_allocates_nothing(tmp_path):
    code, out, err = run(
        ["launch/train.py", f"--config={ROOT}/configs/tpu_v4.py:lora", "--dry_run"]
        + [f"--workdir={tmp_path / 'none'}", "--config.mesh.data=8", "--config.mesh.fsdp=4"]
        + ["--config.score.updates_per_step=3"]
    )
    assert code == 0, err
    assert "data 8 x fsdp 4 = 32 devices" in out
    assert "3 score updates a step, 2 of them on 128 further prompts and samples" in out
    assert "865,910,724" in out and "340,387,840" in out and "151,277,313" in out
    assert "lora.down.kernel (1280, 256) P('fsdp',)" in out
    assert not (tmp_path / "none").exists()


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "missing teacher": ({"teacher": "{}/nowhere"}, "nowhere does not exist"),
    "pickle": ({"teacher": "{}/pickled"}, "pickle"),
    "pickle as the student's start": ({"student.init": "{}/pickled"}, "pickle"),
    "wrong shape": ({"teacher": "{}/reshaped"}, "does not fit its config.json"),
    "indivisible batch": ({"mesh.fsdp": 3}, "config.batch_size = 4"),
    "more devices than here": ({"mesh.data": 2}, "needs 2 devices; there are 1"),
    "missing prompts": ({"prompts": "{}/none.txt"}, "none.txt"),
    "fewer prompts than a batch": ({"prompts": "{}/few.txt"}, "fewer prompts than the batch"),
    "no such clip": ({"clip.model": "{}/noclip", "clip.weight": 0.1}, "noclip does not exist"),
    "no such layer": ({"score.targets": "to_nothing"}, "match no dense layer"),
    "odd resolution": ({"resolution": 34}, "config.resolution = 34 is not a multiple"),
}


@pytest.fixture(scope="module")
def bad_world(world):
    """The same directory with two broken pipelines and a prompt file that is too short."""
    for name in ("pickled", "reshaped"):
        shutil.copytree(world / "pipeline", world / name)
    weights = world / "pickled" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    path = world / "reshaped" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 2}))
    (world / "few.txt").write_text("a dog\n")
    return world


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line_and_nothing_is_written(bad_world, tmp_path, case):
    changes, message = REFUSALS[case]
    config = load(str(CONFIG))
    config.update_from_flattened_dict(fields(bad_world, changes))
    with pytest.raises(InputError) as error:
        train(config, tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studnet.lr": 1}, "did you mean --config.student.lr?"),
        ({"batch_size": "many"}, "batch_size"),
        ({"teacher": "{}/nowhere"}, "nowhere does not exist"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line_with_exit_code_2(world, tmp_path, changes, message):
    code, _, err = run(command(world, tmp_path / "run", **changes))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_diverged_ends(world, tmp_path):
    """A rate that overflows float32 at the second step: each step after is skipped, and twenty are enough."""
    changes = {"student.lr": 1e30, "steps": 100, "sample.every": 0, "checkpoint.every": 1000}
    code, _, err = run(command(world, tmp_path, **changes))
    assert code == 2 and err.splitlines()[-1].startswith(
        "error: the loss or its gradient was not finite in 20 steps"
    )
    skipped = [line["skipped"] for line in metrics(tmp_path)]
    assert skipped == [0.0] + [1.0] * 20
    assert not (tmp_path / "export").exists()


def test_a_run_of_another_configuration_is_refused_unless_forced(world, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    changed = command(world, tmp_path / "run", **{"vsd.guidance": 2.5, "steps": STEPS + 1})
    code, _, err = run(changed)
    assert code == 2 and "vsd.guidance" in err and "--force" in err and err.count("\n") == 1
    code, _, err = run([*changed, "--force"])
    assert code == 0, err
    assert len(metrics(tmp_path / "run")) == STEPS + 1
