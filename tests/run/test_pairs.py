"""Pairs as launch/pairs.py draws them, against diffusers, killed and resumed, in processes; and a run on them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from documented import block
from forked_commands import Forked, forks
from parity import nchw
from tiny_pipeline import SMALL_UNET, write_pipeline, write_world
from train_command import ROOT, command, fields, lines_of, metrics, run, start
from train_processes import ended, free_port, launch

from sbv2_jax import checkpoint
from sbv2_jax.data.pairs import Pairs
from sbv2_jax.devices.sharding import make_mesh
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.fields import load
from sbv2_jax.run.batches import abstract_batch, next_batch, open_rows
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.dry_run import dry_run
from sbv2_jax.run.loop import train
from sbv2_jax.run.pairs import Drawing, make_pairs
from sbv2_jax.run.sources import Files, sources_of

pytestmark = pytest.mark.slow

COUNT, SHARD = 46, 4
DRAWING = Drawing(steps=3, guidance=3.0, sampler="ddim", seed=7, precision="float32")
SETTINGS = {"count": COUNT, "dtype": "float16", "shard_size": SHARD, "batch_size": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def make(world: Path, out: Path, drawing: Drawing = DRAWING, **changes) -> None:
    settings = {"model": str(world / "pipeline"), "prompts": str(world / "prompts.txt")} | SETTINGS | changes
    make_pairs(settings.pop("model"), settings.pop("prompts"), out, drawing, **settings)


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory) -> Path:
    """Those that nothing disturbed, of one process and one device."""
    out = tmp_path_factory.mktemp("pairs") / "straight"
    make(world, out)
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("pairs-*.array_record"))


def drawn_by(world: Path, out: Path, *flags: str, devices: int = 1) -> Forked:
    settings = {
        "model": world / "pipeline", "prompts": world / "prompts.txt", "out": out, "count": COUNT, "batch_size": 2,
        "shard_size": SHARD, "steps": 3, "guidance": 3, "sampler": "ddim", "seed": 7,
    }  # fmt: skip
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    words = ["launch/pairs.py", *(f"--{name}={value}" for name, value in settings.items()), *flags]
    return forks().start(words, environment={"XLA_FLAGS": xla})


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options", "xl"),
    [
        ("ddim", DDIMScheduler, {}, False),
        ("ddim", DDIMScheduler, {}, True),
        ("dpm", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}, False),
    ],
)
def test_the_latents_are_those_of_diffusers_from_the_same_noise(
    world, tmp_path, sampler, scheduler, options, xl
):
    if xl:
        write_pipeline(tmp_path, xl=True)
        world = Path(shutil.copy(world / "prompts.txt", tmp_path)).parent
    drawing = DRAWING._replace(steps=5, sampler=sampler)
    make(world, tmp_path / "out", drawing, count=5, shard_size=3, dtype="float32")
    found = Pairs(tmp_path / "out")
    rows = [found[index] for index in range(5)]
    prompts = [row.prompt for row in rows]
    assert sorted(prompts) == sorted((world / "prompts.txt").read_text().splitlines()), (
        "a permutation of them"
    )
    theirs = DiffusionPipeline.from_pretrained(world / "pipeline")
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config, **options)
    theirs.set_progress_bar_config(disable=True)
    noise = nchw(initial_noise(7, range(5), (8, 8, 4)))
    with torch.no_grad():
        want = theirs(
            prompts, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
        ).images
    got = np.stack([row.columns["pair_latents"] for row in rows])
    assert got.std() > 0.1
    assert relative_error(nchw(got), want) < 2e-3


def test_a_killed_drawing_goes_on_to_the_same_files_and_draws_no_shard_twice(world, pairs, tmp_path):
    out = tmp_path / "out"
    process = drawn_by(world, out)
    while len(shards(out)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in shards(out)}
    assert 2 <= len(finished) < len(shards(pairs))
    with pytest.raises(InputError, match="its pairs are not finished"):
        Pairs(out)
    process = drawn_by(world, out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"/{COUNT - SHARD * len(finished)} [" in err, "the bar is of what was left to draw"
    assert files_of(out) == files_of(pairs)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_shard_that_was_changed_since_is_made_again_by_the_same_command(world, pairs, tmp_path, capsys):
    out = Path(shutil.copytree(pairs, tmp_path / "out"))
    first, second, *_ = shards(out)
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(shards(pairs)[2].read_bytes())
    with pytest.raises(InputError, match="a shard is not a whole array_record file"):
        Pairs(out).fingerprint()
    make(world, out)
    assert files_of(out) == files_of(pairs)
    assert capsys.readouterr().err.count("it is made again") == 2


def test_two_processes_of_two_devices_write_the_files_of_one(world, pairs, tmp_path):
    joined = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    both = [
        drawn_by(world, tmp_path / "out", *joined, f"--process_id={index}", devices=2) for index in (0, 1)
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert files_of(tmp_path / "out") == files_of(pairs)


def test_a_directory_of_other_settings_is_refused_with_what_differs(world, pairs, tmp_path):
    before = files_of(pairs)
    (tmp_path / "other.txt").write_text("a cat\nanother cat\n")
    write_pipeline(tmp_path, prediction_type="v_prediction", seed=3)
    drawings = {
        "steps is 3 there, 4 here": DRAWING._replace(steps=4),
        r"guidance is 3\.0 there, 1\.0 here; sampler is 'ddim' there, 'dpm' here; seed is 7 there, 8 here": (
            Drawing(3, 0.5, "dpm", 8, "float32")
        ),
    }
    others = {
        "count is 46 there, 40 here": {"count": 40},
        "dtype is 'float16' there, 'float32' here": {"dtype": "float32"},
        "the prompts differ": {"prompts": str(tmp_path / "other.txt")},
        "the model differs in teacher, teacher_schedule": {"model": str(tmp_path / "pipeline")},
        r"latent_shape is \[8, 8, 4\] there, \[16, 16, 4\] here": {"resolution": 64},
    }
    cases = [(message, drawing, {}) for message, drawing in drawings.items()]
    cases += [(message, DRAWING, changes) for message, changes in others.items()]
    for message, drawing, changes in cases:
        with pytest.raises(InputError, match=f"straight holds pairs of other settings: {message}") as raised:
            make(world, pairs, drawing, **changes)
        assert "\n" not in str(raised.value)
    assert files_of(pairs) == before


def test_a_directory_of_something_else_and_wrong_input_leave_nothing(world, tmp_path):
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "letter.txt").write_text("dear reader")
    (tmp_path / "file").touch()
    for out, changes, message in (
        ("something", {}, "is not empty, and has no manifest.json"),
        ("file", {}, "is a file, not a directory"),
        ("new", {"prompts": str(tmp_path / "none.txt")}, "none.txt"),
        ("new", {"model": str(tmp_path / "nowhere")}, "nowhere"),
        ("new", {"resolution": 33}, "config.resolution = 33 is not a multiple"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            make(world, tmp_path / out, **changes)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="steps=2000"):
        make(world, tmp_path / "new", DRAWING._replace(steps=2000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "something"]
    process = subprocess.run(
        [sys.executable, "launch/pairs.py", "--model=bundled", "--prompts=openmoji", f"--out={tmp_path}/new"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr == "error: missing --count (see --help)\n"


FULL = """
import resource, sys
from pathlib import Path
from sbv2_jax.errors import InputError
from sbv2_jax.run.latent_sets import _write_shard
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    _write_shard(Path(sys.argv[1]) / "shard", [bytes(20_000)] * 10)
except InputError as error:
    print(error)
"""


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {tmp_path}/shard: ") and "File too large" in done.stdout
    assert not list(tmp_path.iterdir())


# A run on them

BOTH = {"terms": ("vsd", "regression"), "pairs.share": 0.5, "sample.every": 0}
ALONE = {"student.lr": 3e-3, "ema": 0.0, "steps": 12, "sample.every": 12}


def configuration(world: Path, argument: str = "", **changes):
    config = load(f"{ROOT}/configs/openmoji.py:{argument}")
    config.update_from_flattened_dict(fields(world, changes))
    return config


@pytest.fixture(scope="module")
def straight(world, pairs, tmp_path_factory) -> Path:
    """The run on pairs that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight")
    code, _, err = run(command(world, workdir, **BOTH | {"pairs.path": str(pairs)}))
    assert code == 0, err
    return workdir


def test_two_processes_train_on_the_pairs_of_one(world, pairs, straight, tmp_path):
    for code, err in ended(launch(2, world, tmp_path, **BOTH | {"pairs.path": str(pairs)})):
        assert code == 0, err
    ours, theirs = metrics(tmp_path), metrics(straight)
    assert len(ours) == len(theirs) == 6
    for name in ("loss/regression", "loss/vsd", "loss/score", "latents/std"):
        for line, want in zip(ours, theirs, strict=True):
            assert line[name] == pytest.approx(want[name], rel=2e-4), name


def test_a_killed_run_on_pairs_goes_on_to_the_same_bits(world, pairs, straight, tmp_path):
    changes = BOTH | {"pairs.path": str(pairs)}
    process = start(command(world, tmp_path / "killed", **changes))
    while len(lines_of(tmp_path / "killed")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = run(command(world, tmp_path / "killed", **changes))
    assert code == 0, err
    (step, want, _), (again, got, manifest) = (
        checkpoint.load(workdir / "checkpoints") for workdir in (straight, tmp_path / "killed")
    )
    assert step == again == 6 and got.keys() == want.keys()
    assert [name for name in want if not np.array_equal(got[name], want[name])] == []
    assert manifest.sources["regression"]["sha256"] == Pairs(pairs).fingerprint()
    lines = metrics(tmp_path / "killed")
    assert all(line["loss/regression"] > 0 and line["loss/score"] > 0 for line in lines)
    assert [line["loss/regression"] for line in lines] == [
        line["loss/regression"] for line in metrics(straight)
    ]

    config = configuration(world, **changes)
    moved = shutil.copytree(pairs, tmp_path / "moved")
    config.pairs.path = str(moved)
    assert train(config, tmp_path / "killed") == 0, "the same pairs, elsewhere"
    other = tmp_path / "other"
    make(world, other, DRAWING._replace(seed=8))
    config.pairs.path = str(other)
    with pytest.raises(InputError, match="the files of regression were .* --force=regression"):
        train(config, tmp_path / "killed")


def test_a_run_of_the_regression_alone_has_no_score_model_and_draws_what_the_teacher_does(
    world, pairs, tmp_path
):
    """A start for any teacher: every row is a pair. Its pictures and its export need no score model either."""
    config = configuration(world, "regression", **ALONE | {"pairs.path": str(pairs)})
    assert config.terms == ("regression",) and config.pairs.share == 1
    assert train(config, tmp_path) == 0
    lines = metrics(tmp_path)
    assert lines[-1]["loss/regression"] < 0.9 * lines[0]["loss/regression"]
    assert not any(name for name in lines[0] if "score" in name or "vsd" in name)
    _, arrays, _ = checkpoint.load(tmp_path / "checkpoints")
    assert {name.partition(".")[0] for name in arrays} == {"step", "key", "student", "student_opt"}
    assert (tmp_path / "samples" / "step_000012.png").is_file() and (tmp_path / "export" / "unet").is_dir()


def test_a_term_of_ones_own_fills_rows_beside_the_pairs(world, pairs, tmp_path):
    (tmp_path / "bright.py").write_text(block("docs/extending.md", "a term with rows"))
    terms = ("regression", f"{tmp_path}/bright.py:Bright")
    changes = {"terms": terms, "pairs.path": str(pairs), "pairs.share": 0.5, "sample.every": 0, "steps": 2}
    config = configuration(world, **changes)
    parts = read_parts(config)
    run = assemble(config, parts)
    fillings, digests = open_rows(config, run, sources_of(parts, Files(tmp_path)))
    assert digests.keys() == {"regression", "bright"}
    tokenizers = {"input_ids": parts.tokenizer}
    plain = ["a dog"] * 4
    batch = next_batch(iter([plain]), tokenizers, make_mesh(1, 1, 1), 1, fillings, 5)
    shapes = abstract_batch(4, run)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
    }
    paired, bright = np.asarray(batch["pair_numbers"]) >= 0, np.asarray(batch["level"]) >= 0
    assert paired.tolist() == [False, True, False, True] and (paired != bright).all()
    own = np.asarray(parts.tokenizer.encode(["a red lamp", "a white lamp", "a lamp"]))
    for row in np.flatnonzero(bright):
        assert (own == np.asarray(batch["input_ids"][row])).all(1).any()
    config.pairs.share = 0.75
    with pytest.raises(InputError, match="2 rows of a batch are asked for, and 1 are left"):
        open_rows(config, assemble(config, parts), sources_of(parts, Files(tmp_path)))
    report = dry_run(config, assemble(config, parts), {})
    assert "3 of the 4 rows of a batch are filled for the term 'regression' (config.pairs.path)" in report


def test_pairs_of_another_teacher_are_refused(world, pairs, tmp_path):
    write_pipeline(tmp_path, prediction_type="v_prediction", blocks=SMALL_UNET)
    config = configuration(world, "regression", **ALONE | {"pairs.path": str(pairs)})
    config.teacher = str(tmp_path / "pipeline")
    with pytest.raises(InputError, match="made with another teacher_schedule than this run's") as raised:
        train(config, tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
    config.update(teacher=str(world / "pipeline"), resolution=64)
    with pytest.raises(
        InputError, match=r"pair_latents are float32 \[8, 8, 4\], this run's float32 \[16, 16, 4\]"
    ):
        train(config, tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{number} apples\n" for number in range(48)))
    config.update(resolution=0, batch_size=48, prompts=str(prompts))
    with pytest.raises(InputError, match="config.pairs.path: .*46 rows, and each batch takes 48"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
