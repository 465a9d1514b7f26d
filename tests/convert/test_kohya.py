"""LoRA files in kohya's names, convolutions included, against diffusers and PEFT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import measured
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.utils import convert_state_dict_to_kohya
from lora_readers import assert_close, drawn_by, drawn_by_us, merged_by_peft
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_pipeline import write_one_step

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.lora.files import read_lora
from sbv2_jax.convert.lora.fuse import fuse, fuse_file
from sbv2_jax.convert.lora.kohya import diffusers_names
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network

pytestmark = pytest.mark.slow

RANK, ALPHA, CONV_ALPHA = 4, 6.0, 3.0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_one_step(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory) -> tuple[Path, TorchUNet]:
    """A LoRA of PEFT in every dense layer and convolution: the file that diffusers' own converter makes of it."""
    torch.manual_seed(3)
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    kinds = {name: type(module) for name, module in unet.named_modules()}
    convolutions = [name for name, kind in kinds.items() if kind is torch.nn.Conv2d]
    dense = [name for name, kind in kinds.items() if kind is torch.nn.Linear]
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=dense + convolutions,
        alpha_pattern={f"^{name}": CONV_ALPHA for name in convolutions},
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, unet)
    state = {f"unet.{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    with torch.no_grad():
        for tensor in state.values():
            tensor *= 0.5  # the layers of PEFT share this memory
    tensors = convert_state_dict_to_kohya(state)
    assert len(tensors) == 3 * len(dense + convolutions)
    for name in dense + convolutions:  # the converter writes the rank there
        alpha = CONV_ALPHA if name in convolutions else ALPHA
        tensors[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    save_torch(tensors, path)
    return path, unet


def layers_of(pipeline: Path) -> list[str]:
    params = load_component(pipeline / "unet").params
    return [name.removesuffix(".kernel") for name in params if name.endswith(".kernel")]


def test_it_is_fused_as_peft_merges_it(pipeline, trained):
    path, unet = trained
    base = load_component(pipeline / "unet")
    update = read_lora(path, layers=layers_of(pipeline))
    assert set(update.alphas.values()) == {ALPHA, CONV_ALPHA}
    shapes = {leaf.shape[:-2] for leaf in update.factors.values() if leaf.ndim == 4}
    assert shapes == {(1, 1), (3, 3)}, "convolutions of both sizes"
    got = fuse(base.params, update)
    assert_close(got, merged_by_peft(unet, network(base.config).shapes))
    changed = [name for name in got if not np.array_equal(got[name], base.params[name])]
    assert changed == [name for name in got if name.endswith(".kernel")]


def test_diffusers_draws_with_it_what_we_draw_with_it_fused(pipeline, trained, tmp_path, rng):
    path, _ = trained
    fuse_file(open_model(pipeline), path, tmp_path / "fused")
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    pipe = TorchPipeline.from_pretrained(pipeline)
    plain = drawn_by(pipe, noise)
    pipe.load_lora_weights(str(path))
    theirs, ours = drawn_by(pipe, noise), drawn_by_us(tmp_path / "fused", noise)
    assert measured(float(np.abs(ours - theirs).max())) < 2 / 255
    assert np.abs(theirs - plain).max() > 20 / 255, "the LoRA matters"


@pytest.fixture(scope="module")
def with_text(pipeline, trained, tmp_path_factory) -> tuple[dict[str, Path], dict[str, np.ndarray]]:
    """A LoRA of the text encoder beside the UNet's, in kohya's names and as diffusers writes it, and its merge."""
    torch.manual_seed(4)
    pipe = TorchPipeline.from_pretrained(pipeline)
    settings = {
        "unet": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"], init_lora_weights=False),
        "text_encoder": LoraConfig(
            r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], init_lora_weights=False
        ),
    }
    state = {}
    for part, config in settings.items():
        inject_adapter_in_model(config, getattr(pipe, part))
        state[part] = {
            name: tensor.contiguous()
            for name, tensor in get_peft_model_state_dict(getattr(pipe, part)).items()
        }
    tensors = {f"{part}.{name}": tensor for part, one in state.items() for name, tensor in one.items()}
    tensors = convert_state_dict_to_kohya(tensors)
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = torch.tensor(ALPHA if "unet" in name else 3.0)
    directory = tmp_path_factory.mktemp("both")
    prefix = "lora_te1_" if any("text_model" in name for name in tensors) else "lora_te1_text_model_"
    files = {"kohya": directory / "kohya.safetensors", "diffusers": directory / "diffusers.safetensors"}
    save_torch({name.replace("lora_te1_", prefix): one for name, one in tensors.items()}, files["kohya"])
    TorchPipeline.save_lora_weights(
        directory,
        state["unet"],
        state["text_encoder"],
        weight_name="diffusers.safetensors",
        unet_lora_adapter_metadata=settings["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=settings["text_encoder"].to_dict(),
    )
    shapes = network(load_component(pipeline / "text_encoder").config).shapes
    merged = merged_by_peft(
        pipe.text_encoder, {name.removeprefix("text_model."): one for name, one in shapes.items()}
    )
    return files, {f"text_model.{name}": one for name, one in merged.items()}


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_the_text_encoders_lora_is_fused_too(pipeline, with_text, tmp_path, spelling):
    files, want = with_text
    fuse_file(open_model(pipeline), files[spelling], tmp_path / "fused")
    got = load_component(tmp_path / "fused" / "text_encoder").params
    assert_close(got, want)
    before = load_component(pipeline / "text_encoder").params
    changed = {name for name in got if not np.array_equal(got[name], before[name])}
    assert changed == {name for name in got if name.endswith(("q_proj.kernel", "fc1.kernel"))}
    unet, base = (load_component(one / "unet").params for one in (tmp_path / "fused", pipeline))
    assert not np.array_equal(
        *(one["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.kernel"] for one in (unet, base))
    )
    message = "is not there" if spelling == "kohya" else "is for a text_encoder too"
    with pytest.raises(InputError, match=message):
        fuse_file(open_model(pipeline / "unet"), files[spelling], tmp_path / "out")
    with pytest.raises(
        InputError, match="is not there" if spelling == "kohya" else "not a LoRA of the UNet alone"
    ):
        read_lora(files[spelling], layers=layers_of(pipeline))
    assert not (tmp_path / "out").exists()


def test_diffusers_draws_with_both_what_we_draw_with_both_fused(pipeline, with_text, tmp_path, rng):
    files, _ = with_text
    fuse_file(open_model(pipeline), files["diffusers"], tmp_path / "fused")
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    pipe = TorchPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(str(files["diffusers"]))
    assert pipe.get_list_adapters().keys() == {"unet", "text_encoder"}
    error = np.abs(drawn_by_us(tmp_path / "fused", noise) - drawn_by(pipe, noise)).max()
    assert measured(float(error)) < 2 / 255


def changed(path: Path, directory: Path, **new: np.ndarray) -> Path:
    tensors = load_file(path)
    for name, array in new.items():
        tensors[name.replace("__", ".")] = array
    save_file(tensors, directory / "changed.safetensors")
    return directory / "changed.safetensors"


def test_names_that_are_no_layers_are_listed(pipeline, trained, tmp_path):
    zeros = np.zeros((RANK, 8), np.float32)
    names = {"lora_unet_conv_inn__lora_down__weight": zeros, "lora_unet_mid__alpha": np.zeros((), np.float32)}
    with pytest.raises(InputError, match="in 2 tensors") as error:
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **names), tmp_path / "out")
    for name in names:
        assert f"{name.replace('__', '.')} is not there" in str(error.value)
    text = {"lora_te2_text_model_encoder_layers_0_mlp_fc1__lora_down__weight": zeros}
    with pytest.raises(InputError, match="in 1 tensors: lora_te2_text_model_encoder_layers_0_mlp_fc1"):
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **text), tmp_path / "out")
    dora = {"lora_unet_conv_in__dora_scale": zeros}
    with pytest.raises(InputError, match="in 1 tensors: lora_unet_conv_in.dora_scale"):
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **dora), tmp_path / "out")
    with pytest.raises(InputError, match=r"lora_unet_conv_in.alpha is not there"):
        read_lora(trained[0])  # without the network's layers
    assert not (tmp_path / "out").exists()


def test_an_underscore_that_may_be_two_things_is_not_guessed():
    layers = {"unet": ["a.b_c", "a_b.c", "a.b.d"], "text_encoder": ["a.b_c"]}
    assert diffusers_names(["lora_unet_a_b_d.alpha", "other", "lora_te1_a_b_c.alpha"], layers, "it") == {
        "lora_unet_a_b_d.alpha": "unet.a.b.d.alpha",
        "other": "other",
        "lora_te1_a_b_c.alpha": "text_encoder.a.b_c.alpha",
    }
    with pytest.raises(InputError, match="lora_unet_a_b_c.lora_up.weight is both a.b_c and a_b.c"):
        diffusers_names(["lora_unet_a_b_c.lora_up.weight"], layers, "it")
