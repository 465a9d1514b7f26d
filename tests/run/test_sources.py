"""What a resumed run must find again: the same contents, wherever they lie, and nothing else in their place."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_pipeline import write_pipeline, write_world
from train_command import CONFIG, command, fields, metrics, run

from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.convert.layouts import rewrite
from sbv2_jax.errors import InputError
from sbv2_jax.fields import load
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.loop import train
from sbv2_jax.run.sources import Files, check_forced, sources_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def pipeline(world, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(world / "pipeline", tmp_path / "copy"))


def configuration(pipeline: Path | str):
    config = default_config()
    config.update_from_flattened_dict(
        {"teacher": str(pipeline), "clip.model": str(pipeline), "clip.weight": 0.5}
    )
    return config


def sources(pipeline: Path | str, workdir: Path = Path("nowhere")) -> dict:
    return sources_of(read_parts(configuration(pipeline)), Files(workdir))


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def another_number(path: Path) -> None:
    """Changes one value of the file's last tensor, and nothing of its header."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x01
    path.write_bytes(data)


def other_tokens(path: Path) -> None:
    """Has two words exchange their ids."""
    values = json.loads(path.read_text())
    ids = values["model"]["vocab"]
    ids["a</w>"], ids["b</w>"] = ids["b</w>"], ids["a</w>"]
    path.write_text(json.dumps(values))


UNET = {"teacher", "student"}  # which starts from it


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("unet", UNET),
        ("vae", {"vae"}),
        ("vae_tiny", {"decoder"}),
        ("text_encoder", {"text_encoder"}),
        ("clip", {"clip"}),
    ],
)
def test_one_changed_number_is_another_source_by_its_name(world, pipeline, folder, names):
    (file,) = (pipeline / folder).glob("*.safetensors")
    another_number(file)
    assert changed(sources(world / "pipeline"), sources(pipeline)) == names


def test_tokens_and_schedules_are_sources_too(world, pipeline):
    before = sources(world / "pipeline")
    path = pipeline / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    other_tokens(path)
    assert changed(before, sources(pipeline)) == {"tokenizer"}
    path.write_text(text)
    path = pipeline / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 11}))
    assert changed(before, sources(pipeline)) == {"tokenizer"}
    shutil.copyfile(world / "pipeline" / "tokenizer" / path.name, path)
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.013}))
    assert changed(before, sources(pipeline)) == {"teacher_schedule", "student_schedule"}


def test_what_changes_no_number_is_no_other_source(world, pipeline, tmp_path):
    """Another place, other names of files, something beside them, and what only says where a file came from."""
    before = sources(world / "pipeline")
    (pipeline / "unet" / "README.md").write_text("a UNet")
    shutil.copyfile(
        pipeline / "unet" / "diffusion_pytorch_model.safetensors",
        pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )
    for file in ("vae/config.json", "tokenizer/tokenizer_config.json"):
        values = json.loads((pipeline / file).read_text())
        (pipeline / file).write_text(json.dumps(values | {"_name_or_path": "elsewhere"}, indent=7))
    assert sources(pipeline.rename(tmp_path / "moved")) == before


def test_sdxl_has_two_towers_and_a_null_condition(tmp_path):
    before = sources(write_pipeline(tmp_path / "a", xl=True))
    after = sources(write_pipeline(tmp_path / "b", xl=True, zero_null=False))
    assert changed(before, after) == {"zero_null"} and {"text_encoder", "text_encoder_2"} <= before.keys()
    second = tmp_path / "b" / "pipeline" / "tokenizer_2" / "tokenizer.json"
    other_tokens(second)
    assert changed(after, sources(tmp_path / "b" / "pipeline")) == {"tokenizer"}


def test_weights_as_orbax_have_a_digest(world, tmp_path):
    rewrite(world / "pipeline", tmp_path / "a", orbax=True)
    before = sources(tmp_path / "a")
    assert sources(shutil.copytree(tmp_path / "a", tmp_path / "b")) == before
    assert changed(before, sources(world / "pipeline")) >= UNET


def test_the_commit_of_the_hubs_cache_is_recorded(world, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(world / "pipeline", snapshot)
    found, plain = sources(snapshot), sources(world / "pipeline")
    assert found["teacher"] == plain["teacher"] | {"commit": commit}
    assert found["tokenizer"]["commit"] == commit and "commit" not in plain["teacher"]


def test_files_are_read_once_and_again_when_they_change(world, pipeline, tmp_path, monkeypatch):
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )
    files = Files(tmp_path)
    before = sources_of(read_parts(configuration(pipeline)), files)
    assert len(read) == len(set(read)) > 5
    files.remember()
    del read[:]
    assert sources(pipeline, tmp_path) == before and read == []
    unet = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    another_number(unet)
    assert changed(before, sources(pipeline, tmp_path)) == UNET and read == [str(unet)]
    (tmp_path / "digests.json").write_text("{ torn")
    assert changed(before, sources(pipeline, tmp_path)) == UNET


# What is done with them at a resume


def state() -> dict:
    return {"w": jnp.asarray(np.random.default_rng(5).standard_normal(8, np.float32))}


def opened(directory: Path, config: dict, found: dict, **others) -> Checkpoints:
    return Checkpoints(directory, keep=2, config=config, sources=found, places=("teacher", "clip"), **others)


A, B = {"sha256": "a" * 64}, {"sha256": "b" * 64, "commit": "c" * 40}


@pytest.fixture
def saved(tmp_path) -> Path:
    with opened(tmp_path / "c", {"teacher": "here", "lr": 1.0}, {"teacher": A, "vae": A}) as checkpoints:
        checkpoints.save(1, state())
    return tmp_path / "c"


def test_another_source_is_refused_by_name_and_a_moved_one_is_not(saved):
    moved = {"teacher": "there", "lr": 1.0}
    with opened(saved, moved, {"teacher": A, "vae": A | {"commit": "d" * 40}}) as checkpoints:
        assert checkpoints.restore(state())[0] == 1
    with opened(saved, moved, {"teacher": B, "vae": A}) as checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(state())
    assert (
        "the files of teacher were sha256 aaaaaaaaaaaa, are sha256 bbbbbbbbbbbb of commit cccccccccccc"
        in str(error.value)
    )
    assert "vae" not in str(error.value) and "--force=teacher)" in str(error.value)
    refused = pytest.raises(InputError, match="the files of clip were absent, are sha256 bbbb")
    with opened(saved, moved, {"teacher": A, "vae": A, "clip": B}) as checkpoints, refused:
        checkpoints.restore(state())


def test_force_with_names_lets_pass_what_it_names_and_no_more(saved):
    other = {"teacher": "there", "lr": 2.0}
    for force, refused in (
        (("teacher",), ["lr was 1.0, is 2.0"]),
        (("lr",), ["the files of teacher"]),
        (("lr", "vae"), ["the files of teacher"]),
        ((), ["lr was", "the files of teacher"]),
    ):
        checkpoints = opened(saved, other, {"teacher": B, "vae": A}, force=force)
        with checkpoints, pytest.raises(InputError) as error:
            checkpoints.restore(state())
        said = str(error.value)
        assert all(line in said for line in refused) and said.count(" were ") + said.count(
            " was "
        ) == 1 + len(refused)
    for force in (True, ("teacher", "lr")):
        with opened(saved, other, {"teacher": B, "vae": A}, force=force) as checkpoints:
            assert checkpoints.restore(state())[0] == 1


def test_a_checkpoint_without_sources_is_compared_by_its_fields(tmp_path):
    with opened(tmp_path, {"teacher": "here"}, {}) as checkpoints:
        checkpoints.save(1, state())
    with opened(tmp_path, {"teacher": "here"}, {"teacher": A}) as checkpoints:
        assert checkpoints.restore(state())[0] == 1
    refused = pytest.raises(InputError, match="teacher was 'here', is 'there'")
    with opened(tmp_path, {"teacher": "there"}, {"teacher": A}) as checkpoints, refused:
        checkpoints.restore(state())


def test_other_versions_are_told_and_no_error(saved, monkeypatch, caplog):
    from sbv2_jax.checkpoint import save

    now = save.versions("jax", "orbax-checkpoint")
    monkeypatch.setattr(save, "versions", lambda *packages: now | {"jax": "9.9.9"})
    with opened(saved, {"teacher": "here", "lr": 1.0}, {"teacher": A, "vae": A}) as checkpoints:
        assert checkpoints.restore(state())[0] == 1
    assert f"jax {now['jax']}, now 9.9.9" in caplog.text and "orbax" not in caplog.text
    assert now.keys() == {"sbv2_jax", "jax", "orbax-checkpoint"}


def test_a_name_that_is_none_is_refused_with_the_nearest():
    config, found = configuration("bundled"), {"teacher": A, "zero_null": A}
    check_forced(("student.lr", "student", "teacher", "zero_null", "prompts"), config, found)
    with pytest.raises(InputError, match="--force=studnet.lr: .*did you mean student.lr?"):
        check_forced(("teacher", "studnet.lr"), config, found)


# The command


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    code, _, error = run(
        command(world, workdir, **{"steps": 1, "sample.every": 0, "checkpoint.every": 1, "batch_size": 4})
    )
    assert code == 0, error
    assert json.loads((workdir / "digests.json").read_text())
    return workdir


def resumed(world: Path, workdir: Path, force=False, **changes) -> None:
    config = load(str(CONFIG))
    given = {"steps": 1, "sample.every": 0, "checkpoint.every": 1, "batch_size": 4, **changes}
    config.update_from_flattened_dict(fields(world, given))
    assert train(config, workdir, force=force) == 0


def test_a_run_resumes_with_what_it_had_and_refuses_another(world, trained, tmp_path):
    run_, other = shutil.copytree(trained, tmp_path / "run"), tmp_path / "moved" / "world"
    shutil.copytree(world, other)
    resumed(other, run_, **{"mesh.rules": ((".*", "replicate"),)})
    manifest = json.loads((trained / "checkpoints" / "1" / "manifest.json").read_text())["body"]
    assert manifest["sources"].keys() >= {*UNET, "vae", "text_encoder", "tokenizer", "teacher_schedule"}
    assert "sbv2_jax" in manifest["versions"] and len(metrics(run_)) == 1

    unet = other / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors["conv_in.weight"] = tensors["conv_in.weight"] + np.float32(0.01)
    save_file(tensors, unet, {"format": "pt"})
    with pytest.raises(InputError, match="the files of student were .*the files of teacher were"):
        resumed(other, run_)
    with pytest.raises(InputError, match="the files of teacher were") as error:
        resumed(other, run_, force=("student",))
    assert "student" not in str(error.value).partition("another configuration")[2].replace("--force", "")
    resumed(other, run_, force=("student", "teacher"))


def test_the_flag_takes_names_or_none(world, trained, tmp_path):
    run_ = shutil.copytree(trained, tmp_path / "run")
    changes = {"steps": 1, "sample.every": 0, "checkpoint.every": 1, "batch_size": 4, "student.lr": 1e-5}
    for flag, code in (("--force=vsd.guidance", 2), ("--force=student.lr", 0)):
        found, _, error = run(command(world, run_, flag, **changes))
        assert found == code, error
    assert os.listdir(run_ / "checkpoints")
