"""What a pre-training refuses before anything is drawn, and its command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pretraining import tiny_config

from sbv2_jax import fields
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import load_tokenizer
from sbv2_jax.openmoji.pretrain import run, settings
from sbv2_jax.openmoji.pretrain.run import pretrain

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("unet.widths", (0,), "config.unet.widths must be a tuple"),
        ("vae.kl", -1.0, "config.vae.kl"),
        ("decoder.noise", -0.1, "config.decoder.noise"),
        ("clip.twins", 3, "config.clip.twins = 3 must divide config.clip.batch_size = 4"),
    ],
)
def test_settings_that_are_wrong_are_named(name, value, message):
    config = tiny_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=message):
        settings.validate(config)


def test_config_file_gives_the_defaults_and_refuses_other_arguments():
    file = str(ROOT / "configs" / "openmoji_teacher.py")
    assert fields.load(file) == settings.default_config()
    assert fields.load(f"{file}:runlocal").unet.steps == 4
    assert fields.load(f"{file}:further").init == "bundled"
    with pytest.raises(InputError, match="runlocal"):
        fields.load(f"{file}:runlocl")


def nothing(pipeline: Path) -> None:
    shutil.rmtree(pipeline)


def no_tiny_decoder(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "vae_tiny")


def another_noise(pipeline: Path) -> None:
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))


def another_size(pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nothing, "given does not exist"),
        (no_tiny_decoder, "vae_tiny does not exist"),
        (another_noise, "config.init: the scheduler of .*given is not the one"),
        (another_size, "config.init: .*given is no pipeline of pictures of 64 px"),
    ],
)
def test_a_pipeline_that_cannot_be_gone_on_from_is_named_before_anything_is_drawn(tmp_path, change, message):
    config, given = tiny_config(), tmp_path / "given"
    shutil.copytree(resolve("bundled"), given)
    change(given)
    config.init = str(given)
    with pytest.raises(InputError, match=message):
        pretrain(config, tmp_path / "run", "python launch/pretrain.py")
    assert not (tmp_path / "run" / "world").exists()


def test_another_tokenizer_in_the_directory_is_refused(tmp_path):
    config, given = settings.default_config(), resolve("bundled") / "tokenizer"
    found = run._tokenizer(tmp_path / "tokenizer", None, config.tokenizer, load_pipeline("bundled"))
    assert found.encode(["a dog"]).tolist() == load_tokenizer(given).encode(["a dog"]).tolist()
    words = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())
    names = list(words)
    words[names[-1]], words[names[-2]] = words[names[-2]], words[names[-1]]
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="tokenizer is not the tokenizer of config.init"):
        run._tokenizer(tmp_path / "tokenizer", None, config.tokenizer, load_pipeline("bundled"))


def test_command_names_an_unknown_field():
    command = [sys.executable, "launch/pretrain.py", "--config=configs/openmoji_teacher.py"]
    done = subprocess.run(
        [*command, "--workdir=unused", "--config.unet.step=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown field --config.unet.step; did you mean --config.unet.steps?\n"
