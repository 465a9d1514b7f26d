"""LoRA files against diffusers and PEFT, both ways: what they read of ours, what we read of theirs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import measured
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_logging
from lora_readers import assert_close, drawn_by, drawn_by_us, merged_by_peft
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tiny_pipeline import write_one_step

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.lora.files import Lora, read_lora, save_lora
from sbv2_jax.convert.lora.fuse import fuse, fuse_file
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network

pytestmark = pytest.mark.slow

RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_one_step(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def factors(pipeline) -> dict[str, np.ndarray]:
    """Factors for every dense layer, those outside of the attention included."""
    rng, drawn = np.random.default_rng(0), {}
    for name, leaf in load_component(pipeline / "unet").params.items():
        if name.endswith(".kernel") and leaf.ndim == 2:
            module, (features_in, features_out) = name.removesuffix(".kernel"), leaf.shape
            down, up = rng.standard_normal((features_in, RANK)), rng.standard_normal((RANK, features_out))
            drawn[f"{module}.lora.down.kernel"] = (down / features_in**0.5).astype(np.float32)
            drawn[f"{module}.lora.up.kernel"] = (0.2 * up).astype(np.float32)
    return drawn


@pytest.fixture(scope="module")
def file(factors, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(path, factors, ALPHA)
    return path


def test_diffusers_draws_with_the_file_what_we_draw_with_it_fused(pipeline, file, tmp_path, rng, caplog):
    fuse_file(open_model(pipeline), file, tmp_path / "fused")
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    ours = drawn_by_us(tmp_path / "fused", noise)
    diffusers_logging.enable_propagation()
    pipe = TorchPipeline.from_pretrained(pipeline)
    plain = drawn_by(pipe, noise)
    pipe.load_lora_weights(str(file))
    diffusers_logging.disable_propagation()
    # That a UNet's LoRA has nothing for the text encoder is said of every such file.
    said = [record.message for record in caplog.records if "keys" in record.message]
    assert not [message for message in said if "CLIPTextModel" not in message]
    assert measured(float(np.abs(ours - drawn_by(pipe, noise)).max())) < 2 / 255
    assert np.abs(ours - plain).max() > 20 / 255, "the LoRA matters"
    (config,) = pipe.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    pipe.set_adapters(pipe.get_active_adapters(), adapter_weights=[RANK / ALPHA])
    assert np.abs(ours - drawn_by(pipe, noise)).max() > 4 / 255, "and so does its alpha"


def settings_of(path: Path) -> dict:
    with safe_open(path, framework="np") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    return {name.removeprefix("unet."): value for name, value in settings.items()}


def test_peft_reads_the_file_and_merges_it_as_we_do(pipeline, file):
    base = load_component(pipeline / "unet")
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    config = LoraConfig(**settings_of(file))
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    inject_adapter_in_model(config, unet)
    state = {name.removeprefix("unet."): tensor for name, tensor in load_torch(file).items()}
    result = set_peft_model_state_dict(unet, state)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    assert_close(fuse(base.params, read_lora(file)), merged_by_peft(unet, network(base.config).shapes))


def test_what_is_written_is_read_back_and_written_alike(factors, file, tmp_path):
    got = read_lora(file)
    assert got.factors.keys() == factors.keys() and set(got.alphas.values()) == {ALPHA}
    for name in factors:
        np.testing.assert_array_equal(got.factors[name], factors[name])
    save_lora(tmp_path / "again.safetensors", got.factors, ALPHA)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    with pytest.raises(InputError, match="again.safetensors exists; nothing was written"):
        save_lora(tmp_path / "again.safetensors", got.factors, ALPHA)


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_a_file_of_diffusers_with_ranks_and_alphas_of_its_own(pipeline, tmp_path, spelling):
    """Rank and alpha differ by layer; diffusers writes both spellings, and the metadata of either."""
    base = load_component(pipeline / "unet")
    torch.manual_seed(3)
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "to_out.0"],
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={"attn1.to_q": 5, "to_v": 3},
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, unet)
    state = get_peft_model_state_dict(unet)
    if spelling == "diffusers":
        state = convert_state_dict_to_diffusers(state)
        assert all(".lora.down." in name or ".lora.up." in name for name in state)
    settings = config.to_dict()
    TorchPipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=settings)
    update = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(update.scales.values()) == {5 / 2, 3 / 4, 6 / 4}
    assert_close(fuse(base.params, update), merged_by_peft(unet, network(base.config).shapes))


def rewritten(file: Path, directory: Path, change=None, **metadata: object) -> Path:
    """The file with other tensors and with settings in its metadata as given; without any, with none."""
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    path = directory / "changed.safetensors"
    text = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(tensors, path, metadata=text)
    return path


def with_alphas(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name.replace("lora_A.weight", "alpha")] = np.array(ALPHA, np.float16)


def test_alpha_comes_from_tensors_or_from_the_caller_and_is_never_guessed(file, tmp_path):
    want = read_lora(file).alphas
    assert read_lora(rewritten(file, tmp_path, with_alphas)).alphas == want
    bare = rewritten(file, tmp_path)
    with pytest.raises(InputError, match=r"does not say its alpha: .*--alpha .* here 4\)"):
        read_lora(bare)
    assert read_lora(bare, alpha=ALPHA).alphas == want
    with pytest.raises(InputError, match="says its alpha itself"):
        read_lora(file, alpha=ALPHA)


def test_bfloat16_bases_keep_their_type_and_are_rounded_once(pipeline, file):
    update = read_lora(file)
    half = load_component(pipeline / "unet", dtype="bfloat16").params
    exact = fuse({name: leaf.astype(np.float32) for name, leaf in half.items()}, update)
    for name, leaf in fuse(half, update).items():
        assert leaf.dtype == half[name].dtype
        np.testing.assert_array_equal(leaf, exact[name].astype(leaf.dtype))


LAYER = "unet.time_embedding.linear_1"
SETTINGS = {"unet.r": RANK, "unet.lora_alpha": ALPHA}


def drop_half(tensors: dict[str, np.ndarray]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def convolution(tensors: dict[str, np.ndarray]) -> None:
    tensors["unet.conv_in.lora_A.weight"] = np.zeros((RANK, 4, 3, 3), np.float32)
    tensors["unet.conv_in.lora_B.weight"] = np.zeros((8, RANK, 3, 3), np.float32)


def one_axis(tensors: dict[str, np.ndarray]) -> None:
    tensors["unet.conv_in.lora_A.weight"] = np.zeros((RANK, 4, 3), np.float32)


def bias(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.lora_B.bias"] = np.zeros(32, np.float32)


def twice(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.lora.down.weight"] = tensors[f"{LAYER}.lora_A.weight"]


def integers(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = np.zeros((RANK, 8), np.int32)


REFUSED = {
    "half": (drop_half, SETTINGS, "time_embedding.linear_1 has only one of its two factors"),
    "convolution": (
        convolution,
        SETTINGS,
        r"conv_in has factors of shapes \(3, 3, 4, 4\) and \(3, 3, 4, 8\)",
    ),
    "one axis": (one_axis, SETTINGS, r"in 1 tensors: unet.conv_in.lora_A.weight \(4, 4, 3\)"),
    "bias": (bias, SETTINGS, "linear_1.lora_B.bias"),
    "two spellings": (twice, SETTINGS, "in two spellings"),
    "integers": (integers, SETTINGS, "has type I32"),
    "alpha twice": (with_alphas, SETTINGS, "says alpha twice"),
    "dora": (None, SETTINGS | {"unet.use_dora": True}, "LoRA with use_dora, which is not supported"),
    "rank": (None, SETTINGS | {"unet.r": 8}, "has 4, not 8"),
    "no alpha": (None, {"unet.r": RANK}, "lora_alpha in its metadata is None"),
    "pattern": (None, SETTINGS | {"unet.alpha_pattern": {"(a+)+": 1}}, "is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(file, tmp_path, case):
    change, metadata, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        read_lora(rewritten(file, tmp_path, change, **metadata))


def test_layers_that_the_model_lacks_are_listed_and_nothing_is_written(pipeline, factors, tmp_path):
    first = "time_embedding.linear_1"
    down, up = (factors[f"{first}.lora.{part}.kernel"] for part in ("down", "up"))
    wrong = {}
    for module, features_in in (("text_encoder.q", 8), (first, 5), ("conv_in", 8)):
        wrong |= {f"{module}.lora.down.kernel": down[:features_in], f"{module}.lora.up.kernel": up}
    save_lora(tmp_path / "wrong.safetensors", wrong, ALPHA)
    with pytest.raises(InputError, match="in 3 layers") as error:
        fuse_file(open_model(pipeline), tmp_path / "wrong.safetensors", tmp_path / "out")
    for part in (
        "text_encoder.q is not there",
        f"{first} is (8, 32), the LoRA's is (5, 32)",
        "conv_in is (3, 3, 4, 8), the LoRA's is (8, 32)",
    ):
        assert part in str(error.value)
    assert os.listdir(tmp_path) == ["wrong.safetensors"]


def test_a_pickle_is_refused_unopened(pipeline, tmp_path):
    torch.save({}, tmp_path / "lora.bin")
    (tmp_path / "lora.bin").rename(tmp_path / "lora.safetensors")
    for name in ("lora.safetensors", "none.pt", "none.safetensors"):
        with pytest.raises(InputError, match="pickle" if name != "none.safetensors" else "No such file"):
            fuse_file(open_model(pipeline), tmp_path / name, tmp_path / "out")


def test_a_lora_keeps_its_scale_by_layer():
    down, up = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    lora = Lora(
        {
            "a.lora.down.kernel": down,
            "a.lora.up.kernel": up,
            "b.lora.down.kernel": down,
            "b.lora.up.kernel": up,
        },
        {"a": 8.0, "b": 1.0},
    )
    base = {"a.kernel": np.zeros((2, 2), np.float32), "b.kernel": np.zeros((2, 2), np.float32)}
    fused = fuse(base, lora)
    assert np.all(fused["a.kernel"] == 8) and np.all(fused["b.kernel"] == 1)
