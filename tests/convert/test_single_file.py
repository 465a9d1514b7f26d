"""Checkpoints in one file, in the original names: against diffusers' own converters, and pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from made_run import command
from parity import nchw
from safetensors.numpy import load_file, save_file
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.convert.formats.component import load_component, load_config
from sbv2_jax.convert.formats.ldm_names import unet_names, vae_name
from sbv2_jax.convert.formats.names import torch_names
from sbv2_jax.convert.formats.openclip_names import sources_of
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.single_file import convert
from sbv2_jax.convert.model import open_model
from sbv2_jax.errors import InputError
from sbv2_jax.models import published
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config

FAMILIES = ("sd1", "sd2", "sdxl")


def original(directory: Path, family: str) -> dict[str, np.ndarray]:
    """A pipeline's weights in the names of the original code, with what else lies in such files."""
    vae, text = (load_config(directory / name) for name in ("vae", "text_encoder"))

    def tensors(part: str) -> dict[str, np.ndarray]:
        (path,) = (directory / part).glob("*.safetensors")
        return load_file(path)

    unet = tensors("unet")
    file = {f"model.diffusion_model.{name}": unet[ours] for ours, name in unet_names(unet).items()}
    for name, tensor in tensors("vae").items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        file[f"first_stage_model.{vae_name(name, vae)}"] = tensor
    prefixed = {
        n if n.startswith("text_") else f"text_model.{n}": t for n, t in tensors("text_encoder").items()
    }
    place = {"sd1": "cond_stage_model.", "sdxl": "conditioner.embedders.0."}
    if family == "sd2":
        file |= openclip(prefixed, "cond_stage_model.model.", text)
        layer = "cond_stage_model.model.transformer.resblocks."
        file |= {  # the layer that is not used, and the projection
            name.replace(f"{layer}0.", f"{layer}{text.num_hidden_layers}."): -tensor
            for name, tensor in file.items()
            if name.startswith(f"{layer}0.")
        }
        file["cond_stage_model.model.text_projection"] = np.ones((12, 12), np.float32)
        file["cond_stage_model.model.logit_scale"] = np.asarray(4.6, np.float32)
    else:
        file |= {f"{place[family]}transformer.{name}": tensor for name, tensor in prefixed.items()}
        ids = np.arange(text.max_position_embeddings)[None]
        file[f"{place[family]}transformer.text_model.embeddings.position_ids"] = ids
    if family == "sdxl":
        second = load_config(directory / "text_encoder_2")
        file |= openclip(tensors("text_encoder_2"), "conditioner.embedders.1.model.", second)
        file["conditioner.embedders.1.model.logit_scale"] = np.asarray(4.6, np.float32)
        file["denoiser.sigmas"] = np.linspace(0, 14, 1000, dtype=np.float32)
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        file |= {
            "betas": betas.astype(np.float32),
            "alphas_cumprod": np.cumprod(1 - betas).astype(np.float32),
        }
        file |= {f"model_ema.x{i}": np.zeros(1, np.float32) for i in range(3)}
    return {name: np.ascontiguousarray(tensor) for name, tensor in file.items()}


def openclip(tensors: dict[str, np.ndarray], prefix: str, config) -> dict[str, np.ndarray]:
    thirds, file = {}, {}
    for name, source in sources_of(network(config).shapes).items():
        tensor = tensors[name]
        if source.third is None:
            file[prefix + source.name] = tensor.T if "projection" in name else tensor
        else:
            thirds.setdefault(prefix + source.name, {})[source.third] = tensor
    return file | {name: np.concatenate([parts[i] for i in range(3)]) for name, parts in thirds.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """A family, a pipeline that diffusers wrote, and its weights as one file, beside a base of other weights."""
    world = tmp_path_factory.mktemp(request.param)
    pipeline = write_pipeline(world, xl=request.param == "sdxl", seed=3)
    write_pipeline(world / "other", xl=request.param == "sdxl", seed=4)
    save_file(original(pipeline, request.param), world / "model.safetensors", metadata={"format": "pt"})
    return request.param, pipeline, world


def settings(family: str) -> dict[str, str]:
    return {"prediction_type": "epsilon"} if family == "sd2" else {}


def test_every_weight_is_where_it_came_from_and_diffusers_draws_the_same(made, tmp_path):
    family, pipeline, world = made
    out = tmp_path / "out"
    convert(world / "model.safetensors", out, base=world / "other" / "pipeline", **settings(family))
    for part in load_pipeline(pipeline).family.networks:
        want, got = load_component(pipeline / part).params, load_component(out / part).params
        assert got.keys() == want.keys()
        assert [name for name in want if not np.array_equal(got[name], want[name])] == [], part
    noise = np.random.default_rng(7).standard_normal((1, 8, 8, 4), np.float32)
    images = []
    for directory in (pipeline, out):
        pipe = DiffusionPipeline.from_pretrained(directory)
        pipe.set_progress_bar_config(disable=True)
        run = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
        images.append(pipe("a red apple", latents=nchw(noise), **run).images)
    assert images[0].std() > 0.02 and np.array_equal(*images)


def test_diffusers_own_converters_make_the_same_of_the_file(made):
    family, pipeline, world = made
    file = {name: torch.from_numpy(tensor) for name, tensor in load_file(world / "model.safetensors").items()}
    unet, vae = (
        UNet2DConditionModel.from_pretrained(pipeline / "unet"),
        AutoencoderKL.from_pretrained(pipeline / "vae"),
    )
    converted = {
        "unet": (theirs.convert_ldm_unet_checkpoint(dict(file), dict(unet.config)), unet),
        "vae": (theirs.convert_ldm_vae_checkpoint(dict(file), dict(vae.config)), vae),
    }
    if family != "sd1":
        folder, prefix = {
            "sd2": ("text_encoder", "cond_stage_model.model."),
            "sdxl": ("text_encoder_2", "conditioner.embedders.1.model."),
        }[family]
        pipe = DiffusionPipeline.from_pretrained(pipeline)
        tower = getattr(pipe, folder)
        got = theirs.convert_open_clip_checkpoint(tower, dict(file), prefix)
        theirs_has = hasattr(tower, "text_model")
        want = {name if theirs_has else f"text_model.{name}" for name in tower.state_dict()}
        # Their list of what Stable Diffusion 2 does not use is of the published size.
        layer = f"text_model.encoder.layers.{tower.config.num_hidden_layers}."
        got = {name: one for name, one in got.items() if not name.startswith(layer) and name in want}
        assert got.keys() == want
        got = {name if theirs_has else name.removeprefix("text_model."): one for name, one in got.items()}
        converted["text"] = (got, tower)
    for got, module in converted.values():
        want = module.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name].reshape(want[name].shape), want[name]) for name in want)


@pytest.mark.parametrize("architecture", ["sd15", "sd21", "sdxl"])
def test_the_names_at_the_published_sizes_are_those_of_diffusers_converters(architecture):
    """Two of three levels attend, or three of four; the shapes alone, without memory."""
    parts = published.ARCHITECTURES[architecture]
    for config, names_of, convert_, prefix in (
        (
            UNetConfig.from_dict(parts["unet"]),
            lambda names, _: unet_names(names),
            theirs.convert_ldm_unet_checkpoint,
            "model.diffusion_model.",
        ),
        (
            VAEConfig.from_dict(parts["vae"]),
            lambda names, config: {name: vae_name(name, config) for name in names},
            theirs.convert_ldm_vae_checkpoint,
            "first_stage_model.",
        ),
    ):
        names = list(torch_names(network(config).shapes))
        originals = names_of(names, config)
        file = {f"{prefix}{originals[name]}": torch.full((1,), i) for i, name in enumerate(names)}
        assert len(file) == len(names)
        got = convert_(file, config.to_dict())
        assert {name: int(one) for name, one in got.items()} == {name: i for i, name in enumerate(names)}


def test_stable_diffusion_2_is_asked_what_it_predicts(made, tmp_path):
    family, _, world = made
    file, base = world / "model.safetensors", world / "other" / "pipeline"
    if family == "sd2":
        with pytest.raises(InputError, match="does not say what it predicts.*--prediction_type=epsilon"):
            convert(file, tmp_path / "out", base=base)
        with pytest.raises(InputError, match="does not say what it predicts"):
            resolve(f"{file}@{base}")
    convert(file, tmp_path / "v", base=base, prediction_type="v_prediction")
    assert load_pipeline(tmp_path / "v").schedule_config.prediction_type == "v_prediction"
    assert not (tmp_path / "out").exists()


def test_a_file_that_says_that_it_predicts_v_is_believed(made, tmp_path):
    family, _, world = made
    tensors = load_file(world / "model.safetensors")
    save_file(
        tensors | {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)},
        tmp_path / "x.safetensors",
    )
    base = world / "other" / "pipeline"
    convert(tmp_path / "x.safetensors", tmp_path / "out", base=base)
    schedule = load_pipeline(tmp_path / "out").schedule_config
    assert schedule.prediction_type == "v_prediction" and schedule.rescale_betas_zero_snr
    with pytest.raises(InputError, match="contradicts"):
        convert(tmp_path / "x.safetensors", tmp_path / "other", base=base, prediction_type="epsilon")


@pytest.mark.slow
def test_a_file_is_named_where_a_model_is(made, tmp_path, monkeypatch):
    family, pipeline, world = made
    if family == "sd2":
        pytest.skip("it must be converted first, since its prediction type is asked for")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named = f"{world / 'model.safetensors'}@{world / 'other' / 'pipeline'}"
    directory = resolve(named)
    assert directory.is_relative_to(tmp_path) and resolve(named) == directory
    model = open_model(named)
    want = load_component(pipeline / "unet").params
    assert all(np.array_equal(model.unet.params[name], want[name]) for name in want)
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4), np.float32)
    got, want = (sbv2_jax.load(one).draw(["dog"], noise=noise) for one in (named, pipeline))
    assert got.std() > 10 and np.array_equal(got, want)


def test_a_bare_unet_beside_a_base(made, tmp_path):
    family, pipeline, world = made
    base, given = world / "other" / "pipeline", {"prediction_type": "epsilon"}
    weights = load_file(next((pipeline / "unet").glob("*.safetensors")))
    originals = unet_names(weights)
    spellings = {
        "diffusers": weights,
        "original": {originals[name]: tensor for name, tensor in weights.items()},
        "comfy": {f"diffusion_model.{originals[name]}": tensor for name, tensor in weights.items()},
    }
    want, others = load_component(pipeline / "unet").params, load_component(base / "vae").params
    for spelling, tensors in spellings.items():
        save_file(tensors, tmp_path / f"{spelling}.safetensors")
        convert(tmp_path / f"{spelling}.safetensors", tmp_path / spelling, base=base, **given)
        got = load_component(tmp_path / spelling / "unet").params
        assert all(np.array_equal(got[name], want[name]) for name in want)
        vae = load_component(tmp_path / spelling / "vae").params
        assert all(np.array_equal(vae[name], others[name]) for name in others)


def test_what_does_not_fit_is_one_line_and_nothing_is_written(made, tmp_path):
    family, pipeline, world = made
    base, tensors = world / "other" / "pipeline", load_file(world / "model.safetensors")
    file, out = tmp_path / "x.safetensors", tmp_path / "out"
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    stem = "model.diffusion_model.input_blocks.0.0.weight"
    cases = {
        f"in 1 tensors: missing {name}": {k: t for k, t in tensors.items() if k != name},
        "in 1 tensors: unexpected model.diffusion_model.extra": tensors
        | {"model.diffusion_model.extra": np.ones(2, np.float32)},
        f"{name} has type I64": tensors | {name: np.ones(tensors[name].shape, np.int64)},
        f"{name} has shape": tensors | {name: tensors[name][:1]},
        "inpainting: its UNet takes 9": tensors | {stem: np.ones((8, 9, 3, 3), np.float32)},
        "is SDXL's refiner": tensors
        | {"conditioner.embedders.0.model.ln_final.weight": np.ones(2, np.float32)},
        "is a model of EDM's sigmas": tensors | {"edm_mean": np.ones(4, np.float32)},
        "holds no UNet": {"x": np.ones(3, np.float32)},
        "is a LoRA": {"lora_unet_mid.alpha": np.ones(3, np.float32)},
    }
    if family != "sdxl":
        cases["another noise schedule"] = tensors | {
            "alphas_cumprod": np.linspace(1, 0, 1000, dtype=np.float32)
        }
    for message, wrong in cases.items():
        save_file(wrong, file)
        with pytest.raises(InputError, match=message) as caught:
            convert(file, out, base=base, **settings(family))
        assert len(str(caught.value)) < 2500 and "\n" not in str(caught.value) and not out.exists()
    save_file(tensors, file)
    with pytest.raises(InputError, match="has no tokenizer and no scheduler: name a pipeline of its family"):
        convert(file, out)
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="is a pickle, which can run code"):
        resolve(tmp_path / "x.ckpt")


@pytest.mark.slow
def test_the_command_and_a_student_that_starts_from_a_file(made, tmp_path, monkeypatch):
    family, pipeline, world = made
    if family != "sd2":
        pytest.skip("the flag is for this family")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, base = world / "model.safetensors", world / "other" / "pipeline"
    arguments = ["from-single-file", f"--model={file}", f"--base={base}", f"--out={tmp_path / 'out'}"]
    code, _, err = command(*arguments)
    assert code == 2 and "--prediction_type=epsilon" in err and not (tmp_path / "out").exists()
    code, _, err = command(*arguments, "--prediction_type=epsilon", "--dtype=float16")
    assert code == 0, err
    want = load_component(pipeline / "unet", dtype="float16").params
    got = load_component(tmp_path / "out" / "unet").params
    assert all(np.array_equal(got[name], want[name]) for name in want)
    config = default_config()
    config.teacher, config.student.init = str(base), str(file)
    parts = read_parts(config)
    student = load_component(parts.student.directory).params
    want = load_component(pipeline / "unet").params
    assert all(np.array_equal(student[name], want[name]) for name in want)
    assert parts.student_schedule == parts.teacher_schedule
    config.teacher = str(file)
    with pytest.raises(
        InputError, match="has no tokenizer and no scheduler: name the pipeline .*from-single-file"
    ):
        read_parts(config)
