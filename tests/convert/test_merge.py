"""Merges of UNets against arithmetic by hand, and LoRAs extracted from a difference."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import UNet2DConditionModel as TorchUNet
from parity import randomised
from tiny_pipeline import write_pipeline

from sbv2_jax.convert.formats.component import load_component, save_component
from sbv2_jax.convert.lora.extract import Extracted, extract, extract_file, summary
from sbv2_jax.convert.lora.files import read_lora
from sbv2_jax.convert.lora.fuse import fuse
from sbv2_jax.convert.merge import merge_models, weighted_sum
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`pipeline`, and `other`, a UNet alone with the same shapes and other weights."""
    directory = tmp_path_factory.mktemp("models")
    pipeline = write_pipeline(directory)
    torch.manual_seed(1)
    config = TorchUNet.load_config(pipeline / "unet")
    randomised(TorchUNet.from_config(config)).save_pretrained(directory / "other")
    return directory


@functools.cache
def unet_of(directory: Path) -> dict[str, np.ndarray]:
    return load_component(directory).params


def merge(models: list[Path], weights: list[float], out: Path) -> None:
    merge_models([open_model(model) for model in models], weights, out)


def extracted_file(model: Path, base: Path, rank: int, out: Path) -> Extracted:
    return extract_file(open_model(model), open_model(base), rank, out)


def test_what_is_no_unet_is_not_opened_as_one(models, tmp_path):
    shutil.copytree(models / "pipeline" / "vae", tmp_path / "odd" / "unet")
    with pytest.raises(InputError, match="unet holds a VAEConfig, a UNetConfig is expected"):
        open_model(tmp_path / "odd")


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_merge_equals_arithmetic_by_hand_exactly(models, tmp_path, lam):
    trained = [models / "pipeline" / "unet", models / "other"]
    merge(trained, [lam, 1 - lam], tmp_path / "out")
    full, lora = map(unet_of, trained)
    got = unet_of(tmp_path / "out")
    assert got.keys() == full.keys()
    for name in full:
        want = {0.0: lora[name], 1.0: full[name], 0.5: (full[name] + lora[name]) / np.float32(2)}[lam]
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_the_other_parts_and_the_schedule_are_the_first_models(models, tmp_path):
    merge([models / "pipeline", models / "other"], [0.3, 0.7], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (models / "pipeline").iterdir()
    }
    for part in ("vae", "text_encoder", "clip", "vae_tiny"):
        want, got = unet_of(models / "pipeline" / part), unet_of(tmp_path / "out" / part)
        assert all(np.array_equal(got[name], want[name]) for name in want)
    ours, theirs = (
        json.loads((directory / "scheduler" / "scheduler_config.json").read_text())
        for directory in (tmp_path / "out", models / "pipeline")
    )
    assert ours == theirs


def test_three_bare_unets_make_a_bare_unet(models, tmp_path):
    weights = [0.5, 0.75, -0.25]
    merge([models / "other", models / "pipeline", models / "other"], weights, tmp_path / "out")
    full, other = unet_of(models / "pipeline" / "unet"), unet_of(models / "other")
    got = unet_of(tmp_path / "out")
    for name in full:
        want = np.float32(0.5) * other[name] + np.float32(0.75) * full[name]
        np.testing.assert_array_equal(got[name], want - np.float32(0.25) * other[name])


def test_halves_are_added_in_float32_and_rounded_once(rng):
    a, b = (rng.standard_normal(1000).astype(np.float16) for _ in range(2))
    got = weighted_sum([{"x": a}, {"x": b}], [0.3, 0.7])["x"]
    exact = np.float32(0.3) * np.float32(a) + np.float32(0.7) * np.float32(b)
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, exact.astype(np.float16))
    assert (got != np.float16(0.3) * a + np.float16(0.7) * b).any(), "arithmetic in halves differs"
    mixed = weighted_sum([{"x": a}, {"x": b.astype(np.float32)}], [0.3, 0.7])["x"]
    np.testing.assert_array_equal(mixed, exact)


def other_unet(directory: Path, models: Path, **changes: object) -> Path:
    config = TorchUNet.load_config(models / "pipeline" / "unet") | changes
    TorchUNet.from_config(config).save_pretrained(directory)
    return directory


def test_other_shapes_are_refused_with_the_list(models, tmp_path):
    wider = other_unet(tmp_path / "wider", models, cross_attention_dim=20)
    with pytest.raises(InputError, match="does not match") as error:
        merge([models / "pipeline", wider], [0.5, 0.5], tmp_path / "out")
    attentions = [name for name in unet_of(wider) if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(attentions) > 2 and all(f"{name} has shape (20," in str(error.value) for name in attentions)
    assert f"in {len(attentions)} leaves" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_settings_and_schedules_are_refused(models, tmp_path):
    heads = other_unet(tmp_path / "heads", models, attention_head_dim=4)
    with pytest.raises(InputError, match="attention_head_dim is 2 and 4"):
        merge([models / "pipeline", heads], [0.5, 0.5], tmp_path / "out")
    shutil.copytree(models / "pipeline", tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match="prediction_type is 'epsilon' and 'v_prediction'"):
        merge([models / "pipeline", tmp_path / "v"], [0.5, 0.5], tmp_path / "out")
    v = {"prediction_type": "v_prediction"}
    for name, more in (("plain", {}), ("zero_snr", {"rescale_betas_zero_snr": True})):
        shutil.copytree(models / "pipeline", tmp_path / name)
        path = tmp_path / name / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | v | more))
    with pytest.raises(InputError, match="rescale_betas_zero_snr is False and True"):
        merge([tmp_path / "plain", tmp_path / "zero_snr"], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["pipeline", "other"], [0.5, 0.6], "0.5, 0.6 do not sum to 1"),
        (["pipeline", "other"], [float("nan"), 0.5], "do not sum to 1"),
        (["pipeline", "other"], [1.0], "one weight for each: 2 and 1"),
        (["pipeline"], [1.0], "two models or more"),
        (["pipeline", "pipeline/vae"], [0.5, 0.5], "no UNet2DConditionModel"),
        (["pipeline", "none"], [0.5, 0.5], "none does not exist"),
    ],
)
def test_wrong_merges_are_refused_and_nothing_is_written(models, tmp_path, names, weights, message):
    with pytest.raises(InputError, match=message):
        merge([models / name for name in names], weights, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_lora_of_full_rank_is_the_difference(models, tmp_path):
    """Of the dense layers; what else differs is named and left out."""
    file = tmp_path / "lora.safetensors"
    extracted = extracted_file(models / "other", models / "pipeline", 1000, file)
    base, other = unet_of(models / "pipeline" / "unet"), unet_of(models / "other")
    dense = {name for name in base if name.endswith(".kernel") and base[name].ndim == 2}
    assert set(extracted.left_out) == {
        name for name in base if name not in dense and (base[name] != other[name]).any()
    }
    assert extracted.kept == pytest.approx(1)
    update = read_lora(file)
    assert set(update.scales.values()) == {1.0}
    assert extracted.rank == max(min(base[name].shape) for name in dense)
    fused = fuse(base, update)
    for name in base:
        if name in dense:
            assert relative_error(fused[name] - base[name], other[name] - base[name]) < 1e-5
        else:
            np.testing.assert_array_equal(fused[name], base[name])
    told = summary(extracted)
    assert f"in {len(dense)} layers holds 100.00%" in told and "conv_in.kernel" in told


def test_a_lora_of_low_rank_is_the_best_there_is(rng):
    """A difference of rank 3 in one layer is found whole; of a full one the largest singular values are."""
    zeros = {"a.kernel": np.zeros((12, 9), np.float32), "b.kernel": np.zeros((9, 12), np.float32)}
    low = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 9))
    full = rng.standard_normal((9, 12))
    model = {"a.kernel": low.astype(np.float32), "b.kernel": full.astype(np.float32)}
    factors, rank, kept, left_out = extract(model, zeros, 3)
    assert rank == 3 and not left_out
    found = {
        name: factors[f"{name}.lora.down.kernel"] @ factors[f"{name}.lora.up.kernel"] for name in ("a", "b")
    }
    assert relative_error(found["a"], low) < 1e-5
    left = np.linalg.svd(full, compute_uv=False)[3:]
    assert np.linalg.norm(full - found["b"]) == pytest.approx(np.linalg.norm(left), rel=1e-5)
    total = np.sum(low**2) + np.sum(full**2)
    assert kept == pytest.approx(1 - np.sum(left**2) / total)


def test_nothing_to_extract_is_refused(models, tmp_path):
    pipeline = models / "pipeline"
    with pytest.raises(InputError, match="no dense layer differs; 0 other leaves do"):
        extracted_file(pipeline, pipeline, 2, tmp_path / "lora.safetensors")
    unet = load_component(pipeline / "unet")
    biased = unet.params | {"conv_in.bias": unet.params["conv_in.bias"] + 1}
    save_component(tmp_path / "biased", unet.config, biased)
    with pytest.raises(InputError, match="no dense layer differs; 1 other leaves do"):
        extracted_file(tmp_path / "biased", pipeline, 2, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="at least 1, not 0"):
        extracted_file(pipeline, pipeline, 0, tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()
