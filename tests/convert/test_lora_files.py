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
from rewritten_loras import ALPHA, RANK, rewritten, with_alphas
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from tiny_pipeline import write_one_step

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.lora.files import layers_of, modules_of, read_lora
from sbv2_jax.convert.lora.fuse import fuse, fuse_file
from sbv2_jax.convert.lora.kinds import Lora
from sbv2_jax.convert.lora.source import parse_request
from sbv2_jax.convert.lora.write import FORMATS, save_lora
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network

pytestmark = pytest.mark.slow


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


def test_diffusers_draws_with_the_file_what_we_draw_with_it_fused(
    pipeline, factors, file, tmp_path, rng, caplog
):
    """In both formats, and with the tensors alone, as a reader that looks for no metadata takes them."""
    fuse_file(open_model(pipeline), file, tmp_path / "fused")
    save_lora(tmp_path / "kohya.safetensors", factors, ALPHA, file_format="kohya")
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    ours = drawn_by_us(tmp_path / "fused", noise)
    pipe = TorchPipeline.from_pretrained(pipeline)
    plain = drawn_by(pipe, noise)
    assert np.abs(ours - plain).max() > 20 / 255, "the LoRA matters"
    tensors = load_torch(file)
    given = {"file": str(file), "tensors": dict(tensors), "kohya": str(tmp_path / "kohya.safetensors")}
    for name, one in given.items():
        diffusers_logging.enable_propagation()
        pipe.load_lora_weights(one)
        diffusers_logging.disable_propagation()
        assert measured(float(np.abs(ours - drawn_by(pipe, noise)).max())) < 2 / 255, name
        (config,) = pipe.unet.peft_config.values()
        assert (config.r, config.lora_alpha) == (RANK, RANK)
        pipe.unload_lora_weights()
    # That a UNet's LoRA has nothing for the text encoder is said of every such file.
    said = [record.message for record in caplog.records if "keys" in record.message]
    assert not [message for message in said if "CLIPTextModel" not in message]
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name] * (RANK / ALPHA)
    pipe.load_lora_weights(tensors)
    assert np.abs(ours - drawn_by(pipe, noise)).max() > 4 / 255, "and so does its alpha"


def settings_of(path: Path) -> dict:
    with safe_open(path, framework="np") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    return {name.removeprefix("unet."): value for name, value in settings.items()}


def test_peft_reads_the_file_and_merges_it_as_we_do(pipeline, file):
    base = load_component(pipeline / "unet")
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    config = LoraConfig(**settings_of(file))
    assert (config.r, config.lora_alpha) == (RANK, RANK)
    inject_adapter_in_model(config, unet)
    state = {name.removeprefix("unet."): tensor for name, tensor in load_torch(file).items()}
    result = set_peft_model_state_dict(unet, state)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    assert_close(fuse(base.params, read_lora(file)), merged_by_peft(unet, network(base.config).shapes))


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_written_is_read_back_and_written_alike(pipeline, factors, tmp_path, file_format):
    layers = layers_of(load_component(pipeline / "unet").params)
    files = [tmp_path / "one.safetensors", tmp_path / "again.safetensors"]
    save_lora(files[0], factors, ALPHA, file_format=file_format)
    got = read_lora(files[0], layers=layers)
    assert got.factors.keys() == factors.keys() and set(got.scales.values()) == {1.0}
    for name in factors:
        scale = ALPHA / RANK if ".up." in name else 1
        np.testing.assert_array_equal(got.factors[name], np.float32(scale) * factors[name])
    save_lora(files[1], got.factors, RANK, file_format=file_format)
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(InputError, match="again.safetensors exists; nothing was written"):
        save_lora(files[1], got.factors, ALPHA, file_format=file_format)


def test_comfyui_knows_every_name_of_the_kohya_format(factors, tmp_path):
    """Its comfy/lora.py: "lora_unet_" and diffusers' path with "_" for ".", then these three ends."""
    save_lora(tmp_path / "kohya.safetensors", factors, ALPHA, file_format="kohya")
    want = set()
    for layer in modules_of(factors):
        key = "lora_unet_" + layer.replace(".", "_")
        want |= {f"{key}.lora_up.weight", f"{key}.lora_down.weight", f"{key}.alpha"}
    tensors = load_file(tmp_path / "kohya.safetensors")
    assert tensors.keys() == want
    assert {float(one) for name, one in tensors.items() if name.endswith(".alpha")} == {RANK}
    assert all(one.shape == () for name, one in tensors.items() if name.endswith(".alpha"))


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


def of_two_ranks(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.startswith("unet.down_blocks")]:
        tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]


def test_without_an_alpha_it_is_the_rank_layer_by_layer_as_diffusers_has_it(pipeline, file, tmp_path):
    bare = rewritten(file, tmp_path, of_two_ranks)
    got = read_lora(bare)
    assert {leaf.shape[-1] for name, leaf in got.factors.items() if ".down." in name} == {2, RANK}
    pipe = TorchPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(load_torch(bare))
    base = load_component(pipeline / "unet")
    assert_close(fuse(base.params, got), merged_by_peft(pipe.unet, network(base.config).shapes))
    assert read_lora(bare, "rank").scales == got.scales
    assert set(read_lora(bare, 6.0).scales.values()) == {6 / 2, 6 / RANK}


def test_what_is_said_of_alpha_must_agree(file, tmp_path):
    assert set(read_lora(rewritten(file, tmp_path, with_alphas)).scales.values()) == {ALPHA / RANK}
    assert set(read_lora(file, alpha=RANK).scales.values()) == {1.0}, "the same, twice"
    message = (
        r"by the metadata of .* is not that by --alpha=8.0, in \d+ layers: .* has 1 and 2; .*and \d+ more$"
    )
    with pytest.raises(InputError, match=message):
        read_lora(file, alpha=ALPHA)
    first = "unet.time_embedding.linear_1"

    def partly(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{first}.alpha"] = np.asarray(ALPHA)

    with pytest.raises(
        InputError, match=r"does not say the alpha of \d+ layers .*--alpha=NUMBER, or --alpha=rank"
    ):
        read_lora(rewritten(file, tmp_path, partly))
    for wrong in ("ranks", "nan", "inf"):
        with pytest.raises(InputError, match=f"--alpha={wrong}: a finite number or the word rank"):
            read_lora(file, wrong)


def test_several_loras_are_added_with_their_strengths(pipeline, file, tmp_path):
    """Against diffusers, which fuses adapters with weights."""
    other = rewritten(file, tmp_path, of_two_ranks)
    pipe = TorchPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(str(file), adapter_name="one")
    pipe.load_lora_weights(load_torch(other), adapter_name="two")
    pipe.set_adapters(["one", "two"], adapter_weights=[0.7, -0.25])
    fuse_file(open_model(pipeline), [f"{file}:0.7", f"{other}:-0.25"], tmp_path / "fused")
    base = load_component(pipeline / "unet")
    want = merged_by_peft(pipe.unet, network(base.config).shapes)
    assert_close(load_component(tmp_path / "fused" / "unet").params, want)


def test_a_strength_is_a_number_after_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_request("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_request("owner/name:0.5") == ("owner/name", 0.5)
    assert parse_request("C:/loras/a.safetensors") == ("C:/loras/a.safetensors", 1.0)
    (tmp_path / "odd:0.5").mkdir()
    assert parse_request("odd:0.5") == ("odd:0.5", 1.0), "what exists is meant"
    for wrong in ("strong", "nan", "inf", ""):
        with pytest.raises(InputError, match=f"the strength '{wrong}' is not a finite number"):
            parse_request(f"a.safetensors:{wrong}")


def test_bfloat16_bases_keep_their_type_and_are_rounded_once(pipeline, file):
    update = read_lora(file)
    half = load_component(pipeline / "unet", dtype="bfloat16").params
    exact = fuse({name: leaf.astype(np.float32) for name, leaf in half.items()}, update)
    for name, leaf in fuse(half, update).items():
        assert leaf.dtype == half[name].dtype
        np.testing.assert_array_equal(leaf, exact[name].astype(leaf.dtype))


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
        f"{first} is (32, 8), the LoRA's is (32, 5)",
        "conv_in is (8, 4, 3, 3), the LoRA's is (32, 8)",
    ):
        assert part in str(error.value)
    assert os.listdir(tmp_path) == ["wrong.safetensors"]


def test_a_lora_of_another_family_is_called_that(pipeline, rng, tmp_path):
    cross = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    many = [f"{cross.replace('blocks.0.attn2', f'blocks.{index}.attn2')}" for index in range(1, 30)]
    wrong = {}
    for layer in many:
        wrong[f"{layer}.lora.down.kernel"] = rng.standard_normal((2048, 2), np.float32)
        wrong[f"{layer}.lora.up.kernel"] = rng.standard_normal((2, 64), np.float32)
    for file_format, message in (
        (
            "diffusers",
            r"does not fit the unet of .* in 29 layers \(the LoRA is for SDXL, this is another\): ",
        ),
        ("kohya", r"unlike the network's in 87 tensors \(its shapes are those of SDXL\): "),
    ):
        path = tmp_path / f"{file_format}.safetensors"
        save_lora(path, wrong, ALPHA, file_format=file_format)
        with pytest.raises(InputError, match=message) as error:
            fuse_file(open_model(pipeline), path, tmp_path / "out")
        assert str(error.value).endswith(f"; and {(29 if file_format == 'diffusers' else 87) - 10} more")


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
        {"a": 2.0, "b": 0.25},
    )
    base = {"a.kernel": np.zeros((2, 2), np.float32), "b.kernel": np.zeros((2, 2), np.float32)}
    fused = fuse(base, lora)
    assert np.all(fused["a.kernel"] == 8) and np.all(fused["b.kernel"] == 1)
