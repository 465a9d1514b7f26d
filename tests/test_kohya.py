"""LoRA files in kohya's names, convolutions included, against diffusers and PEFT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import measured
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from test_lora_files import assert_close, drawn_by, drawn_by_us, merged_by_peft
from tiny_pipeline import write_pipeline

from sbv2_jax.convert.component import load_component
from sbv2_jax.convert.fuse import fuse, fuse_file
from sbv2_jax.convert.kohya import diffusers_names
from sbv2_jax.convert.lora_files import read_lora
from sbv2_jax.convert.pipeline import save_pipeline
from sbv2_jax.convert.unets import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network

RANK, ALPHA, CONV_ALPHA = 4, 6.0, 3.0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline that draws in one step."""
    directory = tmp_path_factory.mktemp("world")
    save_pipeline(directory / "one_step", base=write_pipeline(directory), one_step=True)
    return directory / "one_step"


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
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1__lora_down__weight": zeros}
    with pytest.raises(InputError, match="in 1 tensors: lora_te_text_model_encoder_layers_0_mlp_fc1"):
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **text), tmp_path / "out")
    dora = {"lora_unet_conv_in__dora_scale": zeros}
    with pytest.raises(InputError, match="in 1 tensors: lora_unet_conv_in.dora_scale"):
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **dora), tmp_path / "out")
    with pytest.raises(InputError, match=r"lora_unet_conv_in.alpha is not there"):
        read_lora(trained[0])  # without the network's layers
    assert not (tmp_path / "out").exists()


def test_an_underscore_that_may_be_two_things_is_not_guessed():
    layers = ["a.b_c", "a_b.c", "a.b.d"]
    assert diffusers_names(["lora_unet_a_b_d.alpha", "other"], layers, "it") == {
        "lora_unet_a_b_d.alpha": "a.b.d.alpha",
        "other": "other",
    }
    with pytest.raises(InputError, match="lora_unet_a_b_c.lora_up.weight is both a.b_c and a_b.c"):
        diffusers_names(["lora_unet_a_b_c.lora_up.weight"], layers, "it")
