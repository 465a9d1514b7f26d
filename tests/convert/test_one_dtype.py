"""A pipeline that is written is of one dtype, and diffusers draws from it as it lies there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from made_run import command, make_run
from safetensors import safe_open
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.convert.formats.component import load_component, save_component
from sbv2_jax.convert.layouts import rewrite
from sbv2_jax.convert.merge import merge_models
from sbv2_jax.convert.model import open_model
from sbv2_jax.run.export import export_checkpoint

SHAPES = ("sd", "sdxl")


@pytest.fixture(scope="module", params=SHAPES)
def half(request, tmp_path_factory) -> Path:
    """A run of a teacher that diffusers wrote in float16, beside that teacher."""
    world = tmp_path_factory.mktemp(request.param)
    write_pipeline(world, xl=request.param == "sdxl")
    pipe = DiffusionPipeline.from_pretrained(world / "pipeline").to(torch.float16)
    extras = {
        name: load_component(world / "pipeline" / name, dtype="float16") for name in ("vae_tiny", "clip")
    }
    (world / "pipeline").rename(world / "float32")
    pipe.save_pretrained(world / "pipeline")
    for name, part in extras.items():
        save_component(world / "pipeline" / name, part.config, part.params)
    assert types(world / "pipeline") == {"F16"}
    make_run(world, "run", resolution=32)
    return world


def types(directory: Path) -> set[str]:
    found = set()
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def said(directory: Path) -> set[str]:
    """What the config.json files of the networks of transformers say."""
    values = [json.loads(path.read_text()) for path in directory.glob("*/config.json")]
    return {one.get("dtype") for one in values if "architectures" in one}


def picture(directory: Path, **settings) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 4, 8, 8), np.float32))
    image = pipe(
        "a red apple", num_inference_steps=1, guidance_scale=0, latents=latents, output_type="np", **settings
    ).images
    assert np.isfinite(image).all() and image.std() > 0.02
    return image


def test_the_export_of_a_run_draws_in_diffusers(half):
    export = half / "run" / "export"
    assert types(export) == {"F32"} and said(export) == {"float32"}
    noise = np.random.default_rng(5).standard_normal((1, 4, 8, 8), np.float32)
    ours = sbv2_jax.load(export).draw(["a red apple"], noise=noise.transpose(0, 2, 3, 1).copy())
    assert np.abs(picture(export) - ours / 255.0).max() < 2 / 255


def test_whatever_writes_a_pipeline_writes_one_dtype(half, tmp_path):
    export_checkpoint(half / "run", tmp_path / "teacher", which="teacher")
    export_checkpoint(half / "run", tmp_path / "student")
    sbv2_jax.load(half / "pipeline").save_pretrained(tmp_path / "saved")
    sbv2_jax.load(half / "pipeline", dtype="bfloat16").save_pretrained(tmp_path / "widened")
    models = [open_model(half / "pipeline")] * 2
    merge_models(models, [0.25, 0.75], tmp_path / "merged")
    for name in ("teacher", "student", "saved", "widened", "merged"):
        assert types(tmp_path / name) == {"F32"} and said(tmp_path / name) == {"float32"}, name
        picture(tmp_path / name)
    merge_models(models, [0.25, 0.75], tmp_path / "asked", dtype="bfloat16")
    assert types(tmp_path / "asked") == {"BF16"} and said(tmp_path / "asked") == {"bfloat16"}


@pytest.mark.slow
def test_the_command_takes_a_dtype(half, tmp_path):
    if half.name.startswith("sdxl"):
        pytest.skip("one shape shows what the flag does")
    code, _, err = command(
        "to-diffusers", f"--run={half / 'run'}", f"--out={tmp_path / 'out'}", "--dtype=float16"
    )
    assert code == 0, err
    assert types(tmp_path / "out") == {"F16"} and said(tmp_path / "out") == {"float16"}


def test_a_round_trip_keeps_the_types_and_what_the_files_say_of_them(half, tmp_path):
    for name, dtype in (("there", None), ("float32", "float32")):
        rewrite(half / "pipeline", tmp_path / name, orbax=True, dtype=dtype)
        rewrite(tmp_path / name, tmp_path / f"{name} and back", orbax=False)
    assert types(tmp_path / "there and back") == {"F16"}
    assert said(tmp_path / "there and back") == said(half / "pipeline") == {"float16"}
    assert types(tmp_path / "float32 and back") == {"F32"} and said(tmp_path / "float32 and back") == {
        "float32"
    }


def test_a_round_trip_of_the_bundled_pipeline_keeps_that_diffusers_draws_from_it(tmp_path):
    rewrite("bundled", tmp_path / "bundled", orbax=True)
    rewrite(tmp_path / "bundled", tmp_path / "bundled and back", orbax=False)
    assert types(tmp_path / "bundled and back") == {"F16"}
    assert said(tmp_path / "bundled and back") == {"float32"}
