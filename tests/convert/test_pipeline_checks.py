"""What makes a pipeline undrawable is one line, in every command that opens it, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline as TorchPipeline
from parity import nchw
from safetensors.numpy import load_file, save_file
from tiny_pipeline import LENGTH, write_pipeline
from transformers import CLIPTokenizer

import sbv2_jax
from sbv2_jax.checkpoint.finite import is_finite
from sbv2_jax.convert.formats.component import load_component, save_component
from sbv2_jax.convert.layouts import rewrite
from sbv2_jax.convert.lora.extract import extract_file
from sbv2_jax.convert.lora.fuse import fuse_file
from sbv2_jax.convert.lora.write import save_lora
from sbv2_jax.convert.merge import merge_models
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def broken(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def lora_file(directory: Path, value: float = 0.1) -> Path:
    kernel = np.full((8, 2), value, np.float32)
    path = directory / "lora.safetensors"
    save_lora(path, {f"{MODULE}.lora.down.kernel": kernel, f"{MODULE}.lora.up.kernel": kernel.T}, 2.0)
    return path


def dry_run(model: Path, sound: Path, out: Path) -> None:
    config = default_config()
    config.teacher, config.clip.model = str(sound), str(model)
    read_parts(config, dry_run=True)


def teach(model: Path, sound: Path, out: Path) -> None:
    config = default_config()
    config.teacher = str(model)
    read_parts(config, dry_run=True)


OPEN: dict[str, Callable[[Path, Path, Path], None]] = {
    "load": lambda model, sound, out: sbv2_jax.load(model),
    "fuse": lambda model, sound, out: fuse_file(open_model(model), lora_file(out.parent), out),
    "merge": lambda model, sound, out: merge_models([open_model(sound), open_model(model)], [0.5, 0.5], out),
    "extract": lambda model, sound, out: extract_file(open_model(model), open_model(sound), 2, out),
    "from-diffusers": lambda model, sound, out: rewrite(model, out, orbax=True),
    "train": teach,
}


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def longer(pipeline: Path) -> str:
    change_json(pipeline / "tokenizer" / "tokenizer_config.json", model_max_length=LENGTH + 1)
    return f"model_max_length={LENGTH + 1}, and the text encoder has max_position_embeddings={LENGTH}"


def more_tokens(pipeline: Path) -> str:
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    known = len(tokenizer)
    tokenizer.add_tokens(["<my-cat>"])  # textual inversion, without the embedding that was learnt
    tokenizer.save_pretrained(pipeline / "tokenizer")
    return f"has tokens up to {known}, and the text encoder embeddings of {known}"


@pytest.mark.parametrize("break_it", [longer, more_tokens])
@pytest.mark.parametrize("command", OPEN)
def test_a_tokenizer_that_does_not_fit_its_text_encoder_is_refused(
    sound, broken, tmp_path, command, break_it
):
    message = break_it(broken)
    with pytest.raises(InputError) as caught:
        OPEN[command](broken, sound, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(broken / "tokenizer") in str(caught.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_fit_the_clip_of_the_loss_is_refused(sound, broken, tmp_path):
    shutil.copytree(broken / "tokenizer", broken / "clip", dirs_exist_ok=True)
    change_json(broken / "clip" / "tokenizer_config.json", model_max_length=99)
    with pytest.raises(InputError, match=r"clip.tokenizer_config\.json: model_max_length=99"):
        dry_run(broken / "clip", sound, tmp_path)


def test_a_tokenizer_shorter_than_its_text_encoder_draws_as_diffusers_does(broken, rng):
    change_json(broken / "tokenizer" / "tokenizer_config.json", model_max_length=LENGTH - 4)
    noise = rng.standard_normal((1, 8, 8, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(broken)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    want = theirs("a red apple and a dog", latents=nchw(noise), **settings).images
    ours = sbv2_jax.load(broken).draw(
        ["a red apple and a dog"], noise=noise, steps=3, guidance=3.0, sampler="ddim"
    )
    assert np.abs(ours / 255.0 - want).max() < 2 / 255
    config = default_config()
    config.teacher, config.clip.model = str(broken), str(broken)
    parts = read_parts(config)
    assert (parts.prompt_length, parts.term_prompt_length("clip")) == (LENGTH - 4, LENGTH - 4)


def test_a_size_that_the_levels_do_not_divide_is_one_line(broken):
    change_json(broken / "unet" / "config.json", sample_size=7)
    with pytest.raises(InputError, match="unet/config.json says sample_size=7: a multiple of 2 is drawn"):
        sbv2_jax.load(broken)


def damage(component: Path, value: float, count: int = 1) -> list[str]:
    (file,) = component.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)[:count]
    for name in names:
        tensors[name].reshape(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return names


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("command", [name for name in OPEN if name != "train"])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_written(sound, broken, tmp_path, command, value):
    (name,) = damage(broken / "unet", value)
    with pytest.raises(InputError, match="unet holds NaN or infinite values in 1 tensor") as caught:
        OPEN[command](broken, sound, tmp_path / "out")
    assert name in str(caught.value) and not (tmp_path / "out").exists()


def test_of_many_such_weights_ten_are_named(broken):
    names = damage(broken / "text_encoder", np.nan, 12)
    with pytest.raises(InputError) as caught:
        sbv2_jax.load(broken)
    said = str(caught.value)
    assert "text_encoder holds NaN or infinite values in 12 tensor(s): " in said and ", and 2 more: " in said
    assert sum(name in said for name in names) == 10


def test_a_lora_or_a_sum_that_is_no_number_is_refused(sound, tmp_path):
    with pytest.raises(InputError, match=r"lora\.safetensors holds NaN or infinite"):
        fuse_file(open_model(sound), lora_file(tmp_path, np.nan), tmp_path / "out")
    for name, value in (("first", 60000), ("second", -60000)):
        half = load_component(sound / "unet", dtype=np.float16)
        half.params["conv_in.bias"] = np.full_like(half.params["conv_in.bias"], value)
        save_component(tmp_path / name, half.config, half.params)
    models = [open_model(tmp_path / name) for name in ("first", "second")]
    with pytest.raises(InputError, match=r"NaN or infinite values in 1 tensor\(s\): conv_in\.bias"):
        merge_models(models, [2.0, -1.0], tmp_path / "out")  # 180,000 is no float16
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_is_what_numpy_says_in_any_order_of_the_axes(rng, dtype):
    array = (1e4 * rng.standard_normal((5, 3, 7))).astype(dtype)
    for value in (np.nan, np.inf, -np.inf):
        bad = array.copy()
        bad[-1, -1, -1] = value
        for turn in (lambda a: a, np.transpose, lambda a: np.moveaxis(a, 0, 1), lambda a: a[::2, ::2, ::2]):
            assert is_finite(turn(array)) and not is_finite(turn(bad))
        assert is_finite(bad[:, :, :-1])
    assert is_finite(array[:0]) and is_finite(np.asarray(array[0, 0, 0]))
    assert torch.isfinite(torch.tensor(array.astype(np.float32))).all()
