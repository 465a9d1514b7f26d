"""LoRA files in kohya's names, convolutions and text encoders included, against diffusers and PEFT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import measured
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_state_dict_to_kohya
from lora_readers import assert_close, drawn_by, drawn_by_us, merged_by_peft
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_pipeline import write_one_step

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.ldm_names import unet_names
from sbv2_jax.convert.lora.files import layers_of, read_lora, read_loras
from sbv2_jax.convert.lora.fuse import fuse, fuse_file
from sbv2_jax.convert.lora.kohya import spellings
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models.published import ARCHITECTURES
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig

pytestmark = pytest.mark.slow

RANK, ALPHA, CONV_ALPHA = 4, 6.0, 3.0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_one_step(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def layers(pipeline) -> list[str]:
    return layers_of(load_component(pipeline / "unet").params)


def peft_unet(pipeline: Path, **settings: object) -> tuple[TorchUNet, dict[str, torch.Tensor]]:
    """A UNet with a random LoRA in every dense layer and convolution, and the LoRA's tensors."""
    torch.manual_seed(3)
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    targets = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    inject_adapter_in_model(
        LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **settings), unet
    )
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    with torch.no_grad():
        for tensor in state.values():
            tensor *= 0.5  # the layers of PEFT share this memory
    return unet, state


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory) -> tuple[Path, TorchUNet]:
    """A file as kohya's scripts write it, with an alpha of its own for convolutions, and PEFT's UNet."""
    convolutions = [name for name, one in TorchUNet.from_pretrained(pipeline / "unet").named_modules()
                    if isinstance(one, torch.nn.Conv2d)]  # fmt: skip
    alphas = {f"^{name}": CONV_ALPHA for name in convolutions}
    unet, state = peft_unet(pipeline, lora_alpha=ALPHA, alpha_pattern=alphas)
    tensors = {}
    for name, tensor in state.items():
        layer, factor = name.rsplit(".lora_", 1)
        flat = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{flat}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(CONV_ALPHA if layer in convolutions else ALPHA)
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    save_torch(tensors, path)
    return path, unet


def test_it_is_fused_as_peft_merges_it(pipeline, trained, layers):
    path, unet = trained
    base = load_component(pipeline / "unet")
    update = read_lora(path, layers=layers)
    assert set(update.scales.values()) == {ALPHA / RANK, CONV_ALPHA / RANK}
    shapes = {leaf.shape[:-2] for leaf in update.factors.values() if leaf.ndim == 4}
    assert shapes == {(1, 1), (3, 3)}, "convolutions of both sizes"
    got = fuse(base.params, update)
    assert_close(got, merged_by_peft(unet, network(base.config).shapes))
    changed = [name for name in got if not np.array_equal(got[name], base.params[name])]
    assert changed == [name for name in got if name.endswith(".kernel")]


def test_the_file_of_diffusers_own_converter_is_read_as_it_is(pipeline, layers, tmp_path):
    """Its alphas are int64, and always the rank."""
    unet, state = peft_unet(pipeline, lora_alpha=RANK)
    tensors = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in state.items()})
    assert {one.dtype for name, one in tensors.items() if name.endswith(".alpha")} == {torch.int64}
    save_torch(tensors, tmp_path / "kohya.safetensors")
    base = load_component(pipeline / "unet")
    update = read_lora(tmp_path / "kohya.safetensors", layers=layers)
    assert len(update.factors) == 2 * len(layers)
    assert_close(fuse(base.params, update), merged_by_peft(unet, network(base.config).shapes))


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


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "sdxl"])
def test_the_first_names_of_a_unets_layers_are_those_that_diffusers_converts(architecture):
    """Every layer of the published UNets, through diffusers' converter of single-file checkpoints."""
    values = ARCHITECTURES[architecture]["unet"]
    layers = layers_of(network(UNetConfig(**{
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    })).shapes)  # fmt: skip
    originals = unet_names(layers)
    assert originals.keys() == set(layers) and len(set(originals.values())) == len(layers)
    config = {"layers_per_block": 2, "addition_embed_type": values.get("addition_embed_type")}
    checkpoint = {
        f"model.diffusion_model.{original}.{leaf}": layer
        for layer, original in originals.items()
        for leaf in ("weight", "bias")
    }
    found = convert_ldm_unet_checkpoint(checkpoint, config)
    assert {name: layer for name, layer in found.items() if name.endswith(".weight")} == {
        f"{layer}.weight": layer for layer in layers
    }
    flat = spellings("unet", layers)
    assert all(len(meant) == 1 for meant in flat.values())
    assert all(flat[original.replace(".", "_")] == [layer] for layer, original in originals.items())


@pytest.mark.parametrize("spelling", ["kohya's SDXL", "ComfyUI's"])
def test_the_first_names_are_read_as_diffusers_reads_them(pipeline, trained, layers, tmp_path, spelling):
    path, _ = trained
    originals = unet_names(layers)
    # diffusers takes this one for an attention: SDXL has no level that upsamples and does not attend
    originals.pop("up_blocks.0.upsamplers.0.conv")
    flat = {layer.replace(".", "_"): layer for layer in originals}
    tensors = {}
    for name, tensor in load_file(path).items():
        layer, _, end = name.removeprefix("lora_unet_").partition(".")
        if layer in flat:
            original = originals[flat[layer]]
            comfy = spelling == "ComfyUI's"
            new = f"diffusion_model.{original}" if comfy else f"lora_unet_{original.replace('.', '_')}"
            tensors[f"{new}.{end}"] = tensor
    save_file(tensors, tmp_path / "first.safetensors")
    update = read_lora(tmp_path / "first.safetensors", layers=layers)
    want = read_lora(path, layers=layers)
    assert len(update.factors) == len(want.factors) - 2
    assert all(np.array_equal(update.factors[name], want.factors[name]) for name in update.factors)
    if spelling == "ComfyUI's":
        return
    unet = TorchUNet.from_pretrained(pipeline / "unet")
    # as SDXL's pipelines load it
    state, alphas = TorchPipeline.lora_state_dict(
        str(tmp_path / "first.safetensors"), unet_config=unet.config
    )
    TorchPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    base = load_component(pipeline / "unet")
    assert_close(fuse(base.params, update), merged_by_peft(unet, network(base.config).shapes))


@pytest.fixture(scope="module")
def with_text(pipeline, tmp_path_factory) -> tuple[dict[str, Path], dict[str, np.ndarray]]:
    """A LoRA of the text encoder beside the UNet's, in four spellings, and its merge into the encoder."""
    torch.manual_seed(4)
    pipe = TorchPipeline.from_pretrained(pipeline)
    targets = {"unet": ["to_q", "to_out.0"], "text_encoder": ["q_proj", "out_proj", "fc1"]}
    settings = {
        part: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets[part], init_lora_weights=False)
        for part, rank in (("unet", RANK), ("text_encoder", 2))
    }
    state = {}
    for part, config in settings.items():
        inject_adapter_in_model(config, getattr(pipe, part))
        state[part] = {
            name: tensor.contiguous()
            for name, tensor in get_peft_model_state_dict(getattr(pipe, part)).items()
        }
    tensors = {f"{part}.{name}": tensor for part, one in state.items() for name, tensor in one.items()}
    directory = tmp_path_factory.mktemp("both")
    spelt = {
        "converted": convert_state_dict_to_kohya(dict(tensors)),
        "kohya": {},
        "2023": {name: tensor for old, tensor in tensors.items() for name in [name_of_2023(old)]},
        "linear layers": {name: tensor for old, tensor in tensors.items() for name in [linear_name(old)]},
    }
    for name, tensor in spelt["converted"].items():  # transformers 4 had text_model before the layers' names
        bare = name.replace("lora_te1_text_model_", "lora_te1_")
        spelt["kohya"][bare.replace("lora_te1_", "lora_te1_text_model_")] = tensor
    files = {name: directory / f"{name}.safetensors" for name in (*spelt, "diffusers")}
    for name, one in spelt.items():
        save_torch(one, files[name])
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


def name_of_2023(name: str) -> str:
    """diffusers 0.14's: an attention's LoRA in its processor, a text encoder's under the UNet's names."""
    name = name.replace(".lora_A.", ".down.").replace(".lora_B.", ".up.")
    for now, then in (("to_q", "to_q"), ("to_out.0", "to_out"), ("q_proj", "to_q"), ("out_proj", "to_out")):
        name = name.replace(f".{now}.down", f".{then}_lora.down").replace(f".{now}.up", f".{then}_lora.up")
    name = name.replace(".fc1.", ".fc1.lora_linear_layer.")
    return name.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.")


def linear_name(name: str) -> str:
    layer, factor = name.split(".lora_")
    middle = "lora" if name.startswith("unet") else "lora_linear_layer"
    return f"{layer}.{middle}.{'down' if factor.startswith('A') else 'up'}.weight"


SPELLINGS = ["converted", "kohya", "2023", "linear layers", "diffusers"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_text_encoders_lora_is_fused_too(pipeline, with_text, layers, tmp_path, spelling):
    files, want = with_text
    fuse_file(open_model(pipeline), files[spelling], tmp_path / "fused")
    got = load_component(tmp_path / "fused" / "text_encoder").params
    assert_close(got, want)
    before = load_component(pipeline / "text_encoder").params
    changed = {name for name in got if not np.array_equal(got[name], before[name])}
    assert changed == {
        name for name in got if name.endswith(("q_proj.kernel", "out_proj.kernel", "fc1.kernel"))
    }
    unet, base = (load_component(one / "unet").params for one in (tmp_path / "fused", pipeline))
    assert {name for name in unet if not np.array_equal(unet[name], base[name])} == {
        name for name in unet if name.endswith(("to_q.kernel", "to_out.0.kernel"))
    }
    kohya = spelling in ("converted", "kohya")
    message = "is not there" if kohya else "is for a text_encoder too"
    with pytest.raises(InputError, match=message):
        fuse_file(open_model(pipeline / "unet"), files[spelling], tmp_path / "out")
    with pytest.raises(InputError, match="is not there" if kohya else "not a LoRA of the UNet alone"):
        read_lora(files[spelling], layers=layers)
    assert not (tmp_path / "out").exists()


def test_diffusers_draws_with_both_what_we_draw_with_both_fused(pipeline, with_text, tmp_path, rng):
    files, _ = with_text
    fuse_file(open_model(pipeline), files["diffusers"], tmp_path / "fused")
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    ours = drawn_by_us(tmp_path / "fused", noise)
    pipe = TorchPipeline.from_pretrained(pipeline)
    for spelling in ("diffusers", "2023"):
        pipe.load_lora_weights(str(files[spelling]))
        assert pipe.get_list_adapters().keys() == {"unet", "text_encoder"}
        assert measured(float(np.abs(ours - drawn_by(pipe, noise)).max())) < 2 / 255, spelling
        pipe.unload_lora_weights()


def changed(path: Path, directory: Path, **new: np.ndarray) -> Path:
    tensors = load_file(path)
    for name, array in new.items():
        tensors[name.replace("__", ".")] = array
    save_file(tensors, directory / "changed.safetensors")
    return directory / "changed.safetensors"


def test_names_that_are_no_layers_are_listed(pipeline, trained, tmp_path):
    ones = np.ones((RANK, 8), np.float32)
    names = {"lora_unet_conv_inn__lora_down__weight": ones, "lora_unet_mid__alpha": np.ones((), np.float32)}
    with pytest.raises(InputError, match="in 2 tensors") as error:
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **names), tmp_path / "out")
    for name in names:
        assert f"{name.replace('__', '.')} is not there" in str(error.value)
    text = {"lora_te2_text_model_encoder_layers_0_mlp_fc1__lora_down__weight": ones}
    with pytest.raises(InputError, match="in 1 tensors: lora_te2_text_model_encoder_layers_0_mlp_fc1"):
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **text), tmp_path / "out")
    dora = {"lora_unet_conv_in__dora_scale": ones}
    with pytest.raises(InputError, match=r"conv_in has DoRA's magnitudes of shape \(4, 8\)"):
        fuse_file(open_model(pipeline), changed(trained[0], tmp_path, **dora), tmp_path / "out")
    with pytest.raises(InputError, match=r"lora_unet_conv_in.alpha is not there.*; and \d+ more"):
        read_lora(trained[0])  # without the network's layers
    assert not (tmp_path / "out").exists()


def test_an_underscore_that_may_be_two_things_is_not_guessed(tmp_path):
    layers = {"unet": ["a.b_c", "a_b.c", "a.b.d"], "text_encoder": ["text_model.a.b_c"]}
    path = tmp_path / "odd.safetensors"
    pair = {"lora_down.weight": np.ones((1, 2), np.float32), "lora_up.weight": np.ones((2, 1), np.float32)}
    right = ("lora_unet_a_b_d", "lora_te_text_model_a_b_c")
    save_file({f"{name}.{end}": leaf for name in right for end, leaf in pair.items()}, path)
    found = read_loras(path, None, layers)
    assert {part: one.layers for part, one in found.items()} == {
        "unet": ["a.b.d"],
        "text_encoder": ["text_model.a.b_c"],
    }
    save_file({f"lora_unet_a_b_c.{end}": leaf for end, leaf in pair.items()}, path)
    with pytest.raises(InputError, match="lora_unet_a_b_c.lora_up.weight is both a.b_c and a_b.c"):
        read_loras(path, None, layers)
