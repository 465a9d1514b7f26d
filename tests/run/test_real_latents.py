"""Latents of real pictures as launch/latents.py makes them, against diffusers; and a run whose GAN loss is on them."""

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL
from ml_collections import ConfigDict
from parity import nchw
from PIL import Image
from tiny_pipeline import SMALL_UNET, write_pipeline, write_world
from train_command import ROOT, command, fields, lines_of, metrics, run, start

from sbv2_jax import checkpoint
from sbv2_jax.data.real_latents import RealLatents
from sbv2_jax.errors import InputError
from sbv2_jax.fields import load
from sbv2_jax.openmoji.world import example
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.dry_run import dry_run
from sbv2_jax.run.latents import make_latents, open_pictures
from sbv2_jax.run.loop import train
from sbv2_jax.run.memory_estimate import activations

pytestmark = pytest.mark.slow

COUNT = 9
SETTINGS = {"dtype": "float32", "shard_size": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 32 px, and a folder of captioned pictures of that size and of others."""
    directory = write_world(tmp_path_factory.mktemp("world"))
    rng = np.random.default_rng(0)
    (directory / "pictures").mkdir()
    for index in range(COUNT):
        size = (32, 32, 3) if index % 2 else (64, 96, 3)
        path = directory / "pictures" / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"apple\n number {index}\n")
    return directory


def make(world: Path, out: Path, **changes) -> None:
    settings = {"model": str(world / "pipeline"), "pictures": str(world / "pictures")} | SETTINGS | changes
    make_latents(settings.pop("model"), settings.pop("pictures"), out, **settings)


@pytest.fixture(scope="module")
def latents(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "made"
    make(world, out)
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_latents_are_those_of_diffusers_and_the_prompts_the_captions(world, latents):
    found = RealLatents(latents)
    rows = [found[index] for index in range(COUNT)]
    assert [row.prompt for row in rows] == [f"apple number {index}" for index in range(COUNT)]
    assert all(row.columns["real"] for row in rows)
    pictures = []
    for index in range(COUNT):
        with Image.open(world / "pictures" / f"{index}.png") as picture:
            if picture.size != (32, 32):
                picture = picture.crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(picture))
    vae = AutoencoderKL.from_pretrained(world / "pipeline", subfolder="vae")
    with torch.no_grad():
        want = vae.encode(nchw(np.stack(pictures)) / 127.5 - 1).latent_dist.mean * vae.config.scaling_factor
    got = np.stack([row.columns["real_latents"] for row in rows])
    assert relative_error(nchw(got), want) < 1e-4


def test_an_interrupted_encoding_goes_on_and_other_settings_are_refused(world, latents, tmp_path):
    out = Path(shutil.copytree(latents, tmp_path / "out"))
    first, *_ = sorted(out.glob("latents-*.array_record"))
    first.unlink()
    make(world, out)
    assert files_of(out) == files_of(latents)
    write_pipeline(tmp_path, seed=3)
    for message, changes in {
        "count is 9 there, 5 here": {"count": 5},
        "dtype is 'float32' there, 'float16' here": {"dtype": "float16"},
        "the model differs in vae": {"model": str(tmp_path / "pipeline")},
        r"--count=10: .*pictures has 9 pictures": {"count": 10},
    }.items():
        with pytest.raises(InputError, match=message) as raised:
            make(world, out, **changes)
        assert "\n" not in str(raised.value)
    assert files_of(out) == files_of(latents)


def test_pictures_without_captions_are_refused(world, tmp_path):
    folder = Path(shutil.copytree(world / "pictures", tmp_path / "pictures"))
    (folder / "3.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"3\.png: its caption, 3\.txt, is blank"):
        open_pictures(str(folder))
    (folder / "3.txt").unlink()
    with pytest.raises(InputError, match=r"3\.png: its caption, 3\.txt, cannot be read"):
        open_pictures(str(folder))
    with pytest.raises(InputError, match="does not exist"):
        open_pictures(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--pictures: nowhere:Pictures: ModuleNotFoundError"):
        open_pictures("nowhere:Pictures")
    (tmp_path / "empty.py").write_text(
        "class Pictures:\n    def __len__(self):\n        return 0\n    def fingerprint(self):\n        return ''\n"
    )
    with pytest.raises(InputError, match=r"empty\.py:Pictures has no pictures"):
        make(world, tmp_path / "out", pictures=f"{tmp_path}/empty.py:Pictures")
    assert not (tmp_path / "out").exists()


def test_the_pictures_of_the_world_have_its_captions():
    found = open_pictures("openmoji")
    want = example("train", 7)
    picture, caption = found[7]
    np.testing.assert_array_equal(picture, want.image)
    assert caption == want.caption and len(found) == 40_000


# A run on them

GAN = {"terms": ("vsd", "gan"), "gan.share": 0.5, "gan.weight": 0.1, "gan.lr": 1e-2, "sample.every": 0}


def configuration(world: Path, **changes) -> ConfigDict:
    config = load(f"{ROOT}/configs/openmoji.py")
    config.update_from_flattened_dict(fields(world, changes))
    return config


def test_a_killed_run_with_a_discriminator_goes_on_to_the_same_bits(world, latents, tmp_path):
    changes = GAN | {"gan.path": str(latents)}
    code, _, err = run(command(world, tmp_path / "straight", **changes))
    assert code == 0, err
    process = start(command(world, tmp_path / "killed", **changes))
    while len(lines_of(tmp_path / "killed")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = run(command(world, tmp_path / "killed", **changes))
    assert code == 0, err
    (step, want, _), (again, got, manifest) = (
        checkpoint.load(tmp_path / name / "checkpoints") for name in ("straight", "killed")
    )
    assert step == again == 6 and got.keys() == want.keys()
    assert {"discriminator", "discriminator_opt"} <= {name.partition(".")[0] for name in got}
    assert [name for name in want if not np.array_equal(got[name], want[name])] == []
    assert manifest.sources["gan"]["sha256"] == RealLatents(latents).fingerprint()
    lines = metrics(tmp_path / "killed")
    assert [line["loss/gan"] for line in lines] == [
        line["loss/gan"] for line in metrics(tmp_path / "straight")
    ]
    assert not any(line["skipped"] for line in lines)
    assert lines[-1]["loss/discriminator"] < lines[0]["loss/discriminator"], "it learns"
    assert all(0 < line["gan/realism"] < 1 for line in lines)
    assert lines[0]["lr/discriminator"] == pytest.approx(1e-2)
    page = (ROOT / "docs/curves.md").read_text(encoding="utf-8")
    assert [name for name in lines[-1].keys() - {"step"} if f"`{name}`" not in page] == []

    other = tmp_path / "other"
    make(world, other, count=8)
    config = configuration(world, **changes)
    config.gan.path = str(other)
    with pytest.raises(InputError, match="the files of gan were .* --force=gan"):
        train(config, tmp_path / "killed")


def test_latents_of_another_autoencoder_are_refused_and_a_dry_run_counts(world, latents, tmp_path):
    write_pipeline(tmp_path, seed=3, blocks=SMALL_UNET)
    config = configuration(world, **GAN | {"gan.path": str(latents)})
    run = assemble(config, read_parts(config))
    report = dry_run(config, run, {})
    assert "2 of the 4 rows of a batch are filled for the term 'gan' (config.gan.path)" in report
    assert "discriminator, trained" in report and activations(run, remat=True) > 0
    config.teacher = str(tmp_path / "pipeline")
    with pytest.raises(InputError, match="made with another vae than this run's") as raised:
        train(config, tmp_path / "run")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
