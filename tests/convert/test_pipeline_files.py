"""Pipeline directories: theirs opened by us, ours run by diffusers, names resolved, wrong ones refused."""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from their_models import listening, their_model
from tiny_tokenizer import write_tokenizer

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.pipeline import (
    component_dir,
    load_pipeline,
    one_step_scheduler,
    read_schedule,
    save_pipeline,
)
from sbv2_jax.diffusion.schedule import ScheduleConfig, make_schedule, to_x0
from sbv2_jax.errors import InputError
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.registry import class_of, network

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PARTS = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "vae_tiny": "AutoencoderTiny", "clip": "CLIPModel",
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A pipeline as diffusers writes it, and a tiny autoencoder and a CLIP beside it."""
    root = tmp_path_factory.mktemp("theirs")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(write_tokenizer(root / "tokens", 2))
    pipeline = StableDiffusionPipeline(
        unet=their_model("UNet2DConditionModel"),
        vae=their_model("AutoencoderKL"),
        text_encoder=their_model("CLIPTextModel"),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "pipeline")
    their_model("AutoencoderTiny").save_pretrained(root / "pipeline" / "vae_tiny")
    their_model("CLIPModel").save_pretrained(root / "pipeline" / "clip")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=12)
    processor.save_pretrained(root / "pipeline" / "clip")
    return root / "pipeline"


@pytest.fixture
def warnings_logged():
    with listening() as messages:
        yield messages


@pytest.fixture
def copied(theirs, tmp_path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(theirs, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@functools.cache
def compiled(config: ModelConfig):
    return jax.jit(network(config).apply, static_argnames="method")


def one_step_pictures(directory: Path, prompts: list[str], noise: np.ndarray) -> np.ndarray:
    """Our networks by hand: x0 at T-1 from noise [B, h, w, 4], decoded, [B, H, W, 3] in [0, 1]."""
    parts = load_pipeline(directory)
    schedule = make_schedule(parts.schedule_config)
    text_encoder, unet, autoencoder = map(parts.component, ("text_encoder", "unet", "vae"))
    encode, predict, vae = map(compiled, (text_encoder.config, unet.config, autoencoder.config))
    context = encode(text_encoder.params, parts.tokenizer.encode(prompts)).last_hidden_state
    t = jnp.full(len(prompts), schedule.num_timesteps - 1, jnp.int32)
    latents = to_x0(schedule, predict(unet.params, noise, t, context), noise, t)
    images = vae(autoencoder.params, latents / autoencoder.config.scaling_factor, method="decode")
    return np.clip(np.asarray(images) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_pictures_of_a_saved_pipeline_equal_diffusers(
    theirs,
    tmp_path,
    rng,
    warnings_logged,
    prediction_type,
):
    base = load_pipeline(theirs)
    scheduler = dict(base.scheduler) | {"prediction_type": prediction_type}
    out = tmp_path / "out"
    save_pipeline(out, unet=base.component("unet"), base=theirs, scheduler=scheduler, one_step=True)
    assert read_schedule(out).prediction_type == prediction_type

    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red apple", "dog dog"]
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    want = pipe(
        prompts,
        num_inference_steps=1,
        guidance_scale=0,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous(),
        height=16,
        width=16,
        output_type="np",
    ).images
    assert warnings_logged == []
    got = one_step_pictures(out, prompts, noise)
    assert got.shape == want.shape == (2, 16, 16, 3)
    assert np.ptp(want) > 0.2 and np.abs(want[0] - want[1]).max() > 0.05  # a comparison that means something
    assert np.abs(got - want).max() < 2 / 255


def test_their_pipeline_is_opened_with_all_its_parts(theirs):
    parts = load_pipeline(theirs, dtype=jnp.bfloat16)
    assert {name: class_of(config) for name, config in parts.configs.items()} == PARTS
    assert parts.schedule_config == ScheduleConfig(
        **BETAS, steps_offset=1, set_alpha_to_one=False, timestep_spacing="leading"
    )
    assert parts.scheduler["_class_name"] == "PNDMScheduler" and parts.scheduler["skip_prk_steps"] is True
    assert parts.tokenizer.pad_token_id == 0
    for name in PARTS:
        loaded = parts.component(name)
        assert loaded.config == parts.configs[name]
        assert {array.dtype for array in loaded.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert parts.component("vae", dtype=np.float32).params["decoder.conv_in.bias"].dtype == np.float32
    with pytest.raises(InputError, match="no part of a pipeline is named 'controlnet'"):
        parts.component("controlnet")


def test_weights_are_not_read_before_they_are_asked_for(copied):
    for path in copied.rglob("*.safetensors"):
        path.unlink()
    parts = load_pipeline(copied)
    assert parts.schedule_config.num_train_timesteps == 1000
    with pytest.raises(InputError, match="unet has no diffusion_pytorch_model.safetensors"):
        parts.component("unet")


def test_a_saved_pipeline_holds_the_same_bytes_and_parts(theirs, tmp_path, warnings_logged):
    out = tmp_path / "deep" / "out"
    save_pipeline(out, base=theirs)
    for name in PARTS:
        assert same(load_component(out / name).params, load_component(theirs / name).params)
    assert load_pipeline(out).scheduler == load_pipeline(theirs).scheduler
    assert load_pipeline(out).configs == load_pipeline(theirs).configs
    assert (out / "clip" / "preprocessor_config.json").read_bytes() == (
        theirs / "clip" / "preprocessor_config.json"
    ).read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert type(pipe.scheduler).__name__ == "PNDMScheduler" and pipe.safety_checker is None
    assert warnings_logged == []
    diffusers.AutoencoderTiny.from_pretrained(out / "vae_tiny")
    transformers.CLIPModel.from_pretrained(out / "clip")
    assert warnings_logged == []
    with pytest.raises(InputError, match=f"{out} is not empty; nothing was written"):
        save_pipeline(out, base=theirs)


def test_a_pipeline_is_made_of_parts_without_a_base(theirs, tmp_path):
    parts = load_pipeline(theirs)
    save_pipeline(
        tmp_path / "out",
        unet=parts.component("unet"),
        vae=theirs / "vae",
        text_encoder=parts.component("text_encoder"),
        clip=parts.component("clip"),
        tokenizer_dir=theirs / "tokenizer",
        scheduler=parts.scheduler,
        dtype=jnp.float16,
    )
    again = load_pipeline(tmp_path / "out")
    assert "clip" in again.configs and "vae_tiny" not in again.configs
    assert again.component("unet").params["conv_in.bias"].dtype == np.float16
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out" / "clip")
    assert dict(processor.crop_size) == {"height": 12, "width": 12}
    with pytest.raises(InputError, match="a pipeline needs vae, text_encoder, tokenizer_dir, scheduler"):
        save_pipeline(tmp_path / "other", unet=parts.component("unet"))
    with pytest.raises(InputError, match="does not hold a tokenizer"):
        save_pipeline(tmp_path / "other", base=theirs, tokenizer_dir=theirs / "unet")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        diffusers.LCMScheduler(),
        diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.DDPMScheduler(trained_betas=np.linspace(0.001, 0.3, 50).tolist(), num_train_timesteps=50),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_one_step_of_the_scheduler_is_the_conversion_to_x0(tmp_path, rng, scheduler):
    scheduler.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "scheduler_config.json").read_text())
    schedule = make_schedule(ScheduleConfig.from_dict(values))
    ours = diffusers.DDPMScheduler.from_config(one_step_scheduler(values))
    ours.set_timesteps(1)
    assert ours.timesteps.tolist() == [schedule.num_timesteps - 1] and ours.init_noise_sigma == 1
    z, output = (rng.standard_normal((1, 4, 3, 3), np.float32) for _ in range(2))
    got = ours.step(torch.from_numpy(output), ours.timesteps[0], torch.from_numpy(z)).prev_sample.numpy()
    want = to_x0(schedule, jnp.asarray(output), jnp.asarray(z), jnp.asarray([schedule.num_timesteps - 1]))
    np.testing.assert_allclose(got, np.asarray(want), rtol=2e-4, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "'StableDiffusion3Pipeline' is not"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "text_encoder_2=None is not supported"),
        ("model_index.json", {"_class_name": ["pipeline", "Remote"]}, "pipeline class .* is not supported"),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, r"unet=\['my_unet', 'MyUNet'\] is not supported"),
        ("model_index.json", {"vae": None}, "vae=None is not supported"),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "unknown part controlnet"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a AutoencoderKL, but"),
        ("unet/config.json", {"cross_attention_dim": 32}, "cross_attention_dim=32, text_encoder hidden_size=24"),
        ("unet/config.json", {"in_channels": 9}, "in_channels=9, vae latent_channels=4"),
        ("vae_tiny/config.json", {"latent_channels": 5}, "vae_tiny latent_channels=5"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "scheduler_config.json.*sigmoid"),
    ],
)  # fmt: skip
def test_a_pipeline_that_is_not_supported_is_refused(copied, file, changes, message):
    edit(copied / file, **changes)
    with pytest.raises(InputError, match=message):
        load_pipeline(copied)


def test_a_missing_part_and_a_link_out_of_a_download_are_refused(copied, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copied / "vae").rename(tmp_path / "elsewhere" / "vae")
    with pytest.raises(InputError, match=f"{copied}/vae does not exist"):
        load_pipeline(copied)
    (copied / "vae").symlink_to(tmp_path / "elsewhere" / "vae")
    assert load_pipeline(copied).component("vae").params  # the user's own, as on a cluster's shared disk
    for mark in (".git", ".cache/huggingface/download"):
        (copied / mark).mkdir(parents=True)
        with pytest.raises(InputError, match=f"{copied}/vae is a symbolic link out of the repository"):
            load_pipeline(copied)
        (copied / mark).rmdir()
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(copied, snapshot, symlinks=True)
    with pytest.raises(InputError, match=f"{snapshot}/vae is a symbolic link out of the repository"):
        load_pipeline(snapshot)
    with pytest.raises(InputError, match="model_index.json does not exist"):
        load_pipeline(tmp_path / "elsewhere")


def test_a_bare_network_stands_for_a_pipeline(theirs):
    assert component_dir(theirs / "unet", "unet") == theirs / "unet"
    with pytest.raises(InputError, match="vae is a AutoencoderKL, no pipeline and no UNet2DConditionModel"):
        component_dir(theirs / "vae", "unet")


def test_a_pipeline_in_the_cache_of_the_hub_is_opened(theirs, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in filter(Path.is_file, theirs.rglob("*")):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(theirs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    parts = load_pipeline(snapshot)
    assert same(parts.component("unet").params, load_pipeline(theirs).component("unet").params)
    save_pipeline(tmp_path / "out", base=snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_safety_checker_is_not_read(copied):
    edit(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (copied / "safety_checker").mkdir()
    (copied / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert load_pipeline(copied).configs.keys() == PARTS.keys()
