"""SDXL from end to end on a tiny pipeline that diffusers wrote: pictures, training, export, conversion, errors."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import measured
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers import StableDiffusionXLPipeline as TorchPipelineXL
from made_run import make_run
from parity import nchw
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import save_file
from their_models import listening
from tiny_pipeline import LENGTH, write_pipeline
from tiny_tokenizer import write_tokenizer
from train_command import CONFIG, command, fields, metrics, run

import sbv2_jax
from sbv2_jax.convert import inspection as listing
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.pipeline import load_pipeline, one_step_scheduler
from sbv2_jax.convert.layouts import rewrite
from sbv2_jax.convert.lora.fuse import fuse_file
from sbv2_jax.errors import InputError
from sbv2_jax.fields import load
from sbv2_jax.run.export import export_lora
from sbv2_jax.run.loop import train
from sbv2_jax.run.trained import open_run_or_model

pytestmark = pytest.mark.slow

PROMPTS = ["a red apple", "dog"]
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
BOUND = 2 / 255


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with prompts and the pipeline whose null condition is zeros, as in SDXL's own."""
    directory = tmp_path_factory.mktemp("sdxl")
    write_pipeline(directory, xl=True)
    (directory / "prompts.txt").write_text("a red apple\na dog\nred dog\napple\nan apple\n")
    return directory


@pytest.fixture(scope="module")
def encoded_null(tmp_path_factory) -> Path:
    """A pipeline whose null condition is the encoded empty prompt, and whose UNet predicts v."""
    return write_pipeline(
        tmp_path_factory.mktemp("encoded"), xl=True, zero_null=False, prediction_type="v_prediction"
    )


@pytest.fixture
def noise(rng) -> np.ndarray:
    return rng.standard_normal((2, 8, 8, 4), np.float32)


def opened(directory: Path) -> DiffusionPipeline:
    """Opens a pipeline in diffusers, which must have nothing to remark."""
    with listening() as messages:
        pipe = DiffusionPipeline.from_pretrained(directory, add_watermarker=False)
    assert messages == [] and type(pipe).__name__ == "StableDiffusionXLPipeline"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def require_equal_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 20 and np.abs(theirs[0] - theirs[1]).max() > 0.1, "a comparison that means something"
    assert measured(float(np.abs(ours / 255.0 - theirs).max())) < BOUND


@pytest.mark.parametrize("pipeline", ["zero null", "encoded null"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_guided_pictures_equal_the_pipeline_of_diffusers(world, encoded_null, noise, pipeline, sampler):
    directory = encoded_null if pipeline == "encoded null" else world / "pipeline"
    pipe = opened(directory)
    if sampler == "dpm":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
        )
    want = pipe(
        PROMPTS, latents=nchw(noise), num_inference_steps=4, guidance_scale=3.0, output_type="np"
    ).images
    ours = sbv2_jax.load(directory)
    require_equal_pictures(ours.draw(PROMPTS, noise=noise, steps=4, guidance=3.0, sampler=sampler), want)
    if sampler == "ddim":
        scheduler = DDPMScheduler.from_config(one_step_scheduler(ours.parts.scheduler))
        pipe.scheduler = scheduler
        require_equal_pictures(
            ours.draw(PROMPTS, noise=noise), pipe(PROMPTS, latents=nchw(noise), **ONE_STEP).images
        )


def test_both_null_conditions_are_those_of_diffusers(world, encoded_null):
    for directory in (world / "pipeline", encoded_null):
        ours, pipe = sbv2_jax.load(directory), opened(directory)
        generator, ids = ours.generator, ours.tokenizer.encode(["a red apple", ""])
        assert ids.shape == (2, 2, LENGTH) and np.any(ids[:, 0] != ids[:, 1]), (
            "the tokenizers pad differently"
        )
        text = generator.text_encoder.apply(ours.params.text_encoder, ids, ours.latent_shape)
        null = generator.text_encoder.null(ours.params.text_encoder, ids[1], ours.latent_shape)
        want = pipe.encode_prompt(["a red apple", ""], device="cpu")
        found = (text.context, null.context, text.added.text_embeds, null.added.text_embeds)
        for got, tensor in zip(found, want, strict=True):
            array = tensor.detach().numpy()
            np.testing.assert_allclose(got, array if got.ndim == array.ndim else array[0], atol=2e-5)
        assert text.added.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 2
        assert null.added.time_ids.tolist() == [32, 32, 0, 0, 32, 32]
        assert np.any(null.context) == (directory == encoded_null)


def test_the_size_that_the_unet_is_told_is_that_of_the_noise(world, rng):
    ours, pipe = sbv2_jax.load(world / "pipeline"), opened(world / "pipeline")
    noise = rng.standard_normal((2, 12, 6, 4), np.float32)
    pipe.scheduler = DDPMScheduler.from_config(one_step_scheduler(ours.parts.scheduler))
    want = pipe(PROMPTS, latents=nchw(noise), height=48, width=24, **ONE_STEP).images
    ids = ours.tokenizer.encode(PROMPTS)
    got = jax.jit(
        lambda params: sbv2_jax.generate(ours.generator, params, ids, ids[0], noise)
    )(ours.params)  # fmt: skip
    require_equal_pictures(255 * np.asarray(got), want)


def test_pictures_in_bfloat16_are_nearly_those_in_float32(world, noise):
    half, full = (sbv2_jax.load(world / "pipeline", dtype=one) for one in (jnp.bfloat16, jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    difference = np.abs(half.draw(PROMPTS, noise=noise) / 255 - full.draw(PROMPTS, noise=noise) / 255)
    assert np.median(difference) < 0.02


def test_in_float16_the_autoencoder_stays_in_float32(world):
    """Only looked at, not run: JAX has no matrix product in float16 on a CPU."""
    params = sbv2_jax.load(world / "pipeline", dtype=jnp.float16).params
    assert {leaf.dtype for leaf in params.vae.values()} == {jnp.dtype(jnp.float32)}
    for half in (params.unet, params.text_encoder):
        assert {leaf.dtype for leaf in half.values()} == {jnp.dtype(jnp.float16)}


def test_a_pipeline_is_saved_and_converted_to_the_same_bytes(world, encoded_null, tmp_path):
    for name, directory in (("zeros", world / "pipeline"), ("encoded", encoded_null)):
        ours = sbv2_jax.load(directory)
        ours.save_pretrained(tmp_path / f"{name}-saved")
        rewrite(directory, tmp_path / f"{name}-orbax", orbax=True)
        rewrite(tmp_path / f"{name}-orbax", tmp_path / f"{name}-back", orbax=False)
        saved, back = (files(tmp_path / f"{name}-{one}") for one in ("saved", "back"))
        networks = {path for path in saved if path.startswith(("clip", "vae_tiny"))}
        assert {path: back[path] for path in saved} == saved and networks
        assert not listing.differences(listing.tensors(directory), listing.tensors(tmp_path / f"{name}-back"))
        opened(tmp_path / f"{name}-back")
        for one in ("orbax", "back"):
            found = load_pipeline(tmp_path / f"{name}-{one}")
            assert found.zero_null == (name == "zeros") and "text_encoder_2" in found.configs
            assert found.tokenizer == ours.tokenizer


def files(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of every file by its path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_the_command_trains_and_exports_what_diffusers_draws(world, tmp_path, noise):
    small = {"steps": 2, "sample.every": 2, "checkpoint.every": 2, "ema": 0.5}
    code, _, err = run(command(world, tmp_path, **small))
    assert code == 0, err
    assert all(line["loss/vsd"] > 0 and line["skipped"] == 0 for line in metrics(tmp_path))
    assert (tmp_path / "samples" / "step_000002.png").exists()
    export = tmp_path / "export"
    want = opened(export)(PROMPTS, latents=nchw(noise), **ONE_STEP).images
    ours = sbv2_jax.load(export).draw(PROMPTS, noise=noise)
    require_equal_pictures(ours, want)
    np.save(tmp_path / "noise.npy", noise)
    generate = ["launch/generate.py", f"--model={export}", f"--out={tmp_path / 'drawn'}"]
    code, _, err = run(
        [*generate, f"--noise={tmp_path / 'noise.npy'}", *(f"--prompt={one}" for one in PROMPTS)]
    )
    assert code == 0, err
    for index, picture in enumerate(ours):
        drawn = np.asarray(Image.open(tmp_path / "drawn" / f"{index:05d}.png"), int)
        assert np.abs(drawn - picture).max() <= 1
    trained, start = (load_component(one / "unet").params for one in (export, world / "pipeline"))
    assert any(np.any(trained[name] != start[name]) for name in start if name.startswith("add_embedding"))
    assert load_pipeline(export).zero_null


def test_a_lora_file_draws_in_diffusers_what_the_export_does(world, tmp_path, noise):
    made = make_run(world, "lora", **{"student.mode": "lora", "ema": 0.0})
    file = tmp_path / "student.safetensors"
    export_lora(made.directory, file)
    pipe = opened(world / "pipeline")
    pipe.scheduler = DDPMScheduler.from_config(one_step_scheduler(dict(pipe.scheduler.config)))
    plain = pipe(PROMPTS, latents=nchw(noise), **ONE_STEP).images
    with listening() as messages:
        pipe.load_lora_weights(str(file))
    # Of a file for the UNet alone diffusers always says that it leaves the text towers as they are.
    assert all(message.startswith("No LoRA keys associated to CLIPText") for message in messages)
    assert pipe.get_list_adapters().keys() == {"unet"}
    want = pipe(PROMPTS, latents=nchw(noise), **ONE_STEP).images
    assert np.abs(want - plain).max() > 20 / 255, "the LoRA matters"
    require_equal_pictures(sbv2_jax.load(made.directory / "export").draw(PROMPTS, noise=noise), want)
    fuse_file(open_run_or_model(world / "pipeline"), file, tmp_path / "fused")
    fused, exported = (listing.tensors(one) for one in (tmp_path / "fused", made.directory / "export"))
    assert not listing.differences(fused, exported)


def test_dry_run_counts_sdxl_and_allocates_nothing(tmp_path, capsys):
    config = load(str(CONFIG.with_name("tpu_v4.py")))
    config.update(architecture="sdxl", resolution=1024)
    config.mesh.data = 8
    before = sum(array.nbytes for array in jax.live_arrays())
    assert train(config, tmp_path / "none", dry_run=True) == 0
    out = capsys.readouterr().out
    assert "latents: 128 x 128 x 4" in out
    assert "2,567,463,684" in out and "817,720,320" in out, "the UNet; both text towers"
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
    assert not (tmp_path / "none").exists()


@pytest.fixture
def copied(world, tmp_path) -> Path:
    """A copy of the pipeline that a test may spoil."""
    shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    return tmp_path / "pipeline"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, r"text_encoder_2=\[None, None\] is not supported"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "no"}, "='no' is neither true nor false"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "unknown part text_encoder_2"),
        ("unet/config.json", {"cross_attention_dim": 12}, "=12, text_encoder hidden_size=12 [+] text_encoder_2 hi"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type=None needs another pipeline"),
        ("unet/config.json", {"addition_time_embed_dim": 8}, "=34, text_encoder_2 projection_dim=10 .* are 58"),
        ("text_encoder_2/config.json", {"projection_dim": 12}, "projection_dim=12 and 6 sizes of 4 are 36"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 77}, "text_encoder_2 max_position_embeddings=77"),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "text_encoder_2 is a CLIPTextModel, but"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_in_one_line(copied, file, changes, message):
    edit(copied / file, **changes)
    with pytest.raises(InputError, match=message) as error:
        sbv2_jax.load(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_part_is_named_and_nothing_is_written(world, copied, tmp_path, part):
    shutil.rmtree(copied / part)
    config = load(str(CONFIG))
    config.update_from_flattened_dict(fields(world, {"teacher": str(copied)}))
    with pytest.raises(InputError, match=f"{copied / part} does not exist"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_family_is_refused(world, tmp_path):
    other = write_pipeline(tmp_path)
    config = load(str(CONFIG))
    config.update_from_flattened_dict(fields(world, {"student.init": str(other)}))
    with pytest.raises(
        InputError, match="unet does not fit the teacher's text encoders: .*=12, text_enc"
    ) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "length, message",
    [
        (LENGTH - 1, f"the tokenizers give {LENGTH} and {LENGTH - 1} tokens a prompt"),
        (
            LENGTH + 1,
            f"model_max_length={LENGTH + 1}, and the text encoder has max_position_embeddings={LENGTH}",
        ),
    ],
)
def test_tokenizers_of_different_lengths_are_refused(world, copied, tmp_path, length, message):
    write_tokenizer(tmp_path / "other", 2, length)
    shutil.rmtree(copied / "tokenizer_2")
    shutil.copytree(tmp_path / "other", copied / "tokenizer_2")
    with pytest.raises(InputError, match=message):
        sbv2_jax.load(copied).draw(PROMPTS)
    config = load(str(CONFIG))
    config.update_from_flattened_dict(fields(world, {"teacher": str(copied)}))
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_a_lora_of_the_unet_and_both_towers_is_fused(world, tmp_path, noise, spelling):
    """In kohya's names the layers of the UNet are spelt as diffusers spells them, not in SDXL's first names."""
    pipe = opened(world / "pipeline")
    pipe.scheduler = DDPMScheduler.from_config(one_step_scheduler(dict(pipe.scheduler.config)))
    torch.manual_seed(4)
    targets = {"unet": ["to_q"], "text_encoder": ["q_proj"], "text_encoder_2": ["fc1", "v_proj"]}
    states, settings = {}, {}
    for part, names in targets.items():
        config = LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=False)
        module = inject_adapter_in_model(config, getattr(pipe, part))
        states[part] = {name: leaf.contiguous() for name, leaf in get_peft_model_state_dict(module).items()}
        settings[f"{part}_lora_adapter_metadata"] = config.to_dict()
    if spelling == "diffusers":
        TorchPipelineXL.save_lora_weights(
            tmp_path,
            *states.values(),
            weight_name="lora.safetensors",
            **settings,
        )
    else:
        save_file(kohya_names(states, alpha=3.0), tmp_path / "lora.safetensors")
    want = pipe(PROMPTS, latents=nchw(noise), **ONE_STEP).images  # with the adapters still in it
    fuse_file(open_run_or_model(world / "pipeline"), tmp_path / "lora.safetensors", tmp_path / "fused")
    changed = listing.differences(listing.tensors(tmp_path / "fused"), listing.tensors(world / "pipeline"))
    assert {line.split(".")[0] for line in changed} == set(targets)
    require_equal_pictures(sbv2_jax.load(tmp_path / "fused").draw(PROMPTS, noise=noise), want)


def kohya_names(states: dict[str, dict[str, torch.Tensor]], alpha: float) -> dict[str, torch.Tensor]:
    """Returns the factors under the names of kohya's scripts, with an alpha for every layer."""
    found = {}
    for part, state in states.items():
        for name, leaf in state.items():
            module, end = name.split(".lora_")
            text = "" if part == "unet" or module.startswith("text_model.") else "text_model_"
            prefix = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}[part]
            path = f"lora_{prefix}_{text}{module.replace('.', '_')}"
            found[f"{path}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = leaf
            found[f"{path}.alpha"] = torch.tensor(alpha)
    return found
