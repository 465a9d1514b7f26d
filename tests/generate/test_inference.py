"""Pictures from a pipeline directory against diffusers' own pipeline on the same noise, and the pure function."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers import StableDiffusionPipeline as TorchPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from forked_commands import ROOT, forks
from parity import nchw
from PIL import Image
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.pipeline import one_step_scheduler
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.generate.draw import draw
from sbv2_jax.generate.pipeline import Pipeline
from sbv2_jax.run.drawn import drawn_of

PROMPTS = ["a red apple", "dog"]
SETTINGS = {"num": 1, "seed": 0, "noise_file": None, "steps": 1, "guidance": 1.0, "sampler": "dpm"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("inference"), prediction_type="v_prediction")


@pytest.fixture(scope="module")
def ours(directory) -> Pipeline:
    return sbv2_jax.load(directory)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("ddim", DDIMScheduler, {}),
        ("dpm", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    ],
)
def test_teacher_pictures_equal_the_pipeline_of_diffusers(ours, directory, rng, sampler, scheduler, options):
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(directory)
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config, **options)
    theirs.set_progress_bar_config(disable=True)
    want = theirs(
        PROMPTS, latents=nchw(noise), num_inference_steps=4, guidance_scale=3.0, output_type="np"
    ).images
    got = ours.draw(PROMPTS, noise=noise, steps=4, guidance=3.0, sampler=sampler)
    assert got.std() > 20
    assert np.abs(got / 255.0 - want).max() < 2 / 255


@pytest.mark.parametrize("guidance", [0, 0.5, -2.0, 1.0])
def test_a_guidance_of_one_or_less_is_none_as_in_diffusers(ours, directory, rng, guidance):
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(directory)
    theirs.set_progress_bar_config(disable=True)
    want = theirs(
        PROMPTS, latents=nchw(noise), num_inference_steps=4, guidance_scale=guidance, output_type="np"
    ).images
    got = ours.draw(PROMPTS, noise=noise, steps=4, guidance=guidance, sampler="ddim")
    assert np.abs(got / 255.0 - want).max() < 2 / 255
    unprompted = theirs(
        ["", ""], latents=nchw(noise), num_inference_steps=4, guidance_scale=1.0, output_type="np"
    ).images
    assert np.abs(unprompted - want).max() > 10 / 255  # what the formula would give for 0


def test_one_step_is_the_x0_that_diffusers_predicts(ours, directory, rng):
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(directory)
    with torch.no_grad():
        context = theirs.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        z, t = nchw(noise), torch.tensor(999)
        x0 = theirs.scheduler.alphas_cumprod[999] ** 0.5 * z
        x0 -= (1 - theirs.scheduler.alphas_cumprod[999]) ** 0.5 * theirs.unet(z, t, context).sample
        images = theirs.vae.decode(x0 / theirs.vae.config.scaling_factor).sample
    want = (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours.draw(PROMPTS, noise=noise) / 255.0 - want).max() < 1 / 255


def test_a_pipeline_is_saved_with_the_weights_that_it_has(ours, directory, tmp_path, rng):
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    unet = {name: 1.1 * leaf for name, leaf in ours.params.unet.items()}
    changed = dataclasses.replace(ours, params=dataclasses.replace(ours.params, unet=unet))
    changed.save_pretrained(tmp_path / "out")
    saved = load_component(tmp_path / "out" / "unet").params
    assert all(np.array_equal(saved[name], unet[name]) for name in unet)
    again = sbv2_jax.load(tmp_path / "out")
    assert all(np.array_equal(again.params.vae[name], leaf) for name, leaf in ours.params.vae.items())
    theirs = TorchPipeline.from_pretrained(tmp_path / "out")
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    want = theirs(PROMPTS, latents=nchw(noise), **settings).images
    got = changed.draw(PROMPTS, noise=noise, steps=4, guidance=3.0, sampler="ddim")
    assert np.abs(got / 255.0 - want).max() < 2 / 255
    with pytest.raises(InputError, match="not empty; nothing was written"):
        ours.save_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_picture_depends_on_its_prompt_seed_and_index_alone(ours):
    three = ours.draw(["a dog", "a red apple", "dog"], seed=3)
    alone = ours.draw(["a red apple"], seed=3, indices=[1])
    assert np.abs(three[1].astype(int) - alone[0]).max() <= 1
    other = ours.draw(["a red apple"], seed=4, indices=[1])
    assert np.abs(three[1].astype(int) - other[0]).max() > 20


def test_a_call_gives_a_picture_for_a_prompt_and_a_list_for_a_list(ours):
    arrays = ours.draw(PROMPTS, seed=3)
    pictures = ours(PROMPTS, seed=3)
    assert isinstance(pictures, list) and [picture.size for picture in pictures] == [(32, 32)] * 2
    assert all(np.array_equal(picture, array) for picture, array in zip(pictures, arrays, strict=True))
    one = ours(PROMPTS[1], seed=3, indices=[1])
    assert isinstance(one, Image.Image)
    assert np.abs(np.asarray(one, int) - arrays[1]).max() <= 1
    with pytest.raises(InputError, match="a list of prompts is expected, not one: \\['dog'\\]"):
        ours.draw("dog")


def test_seed_0_is_a_seed_and_noise_is_standard_normal():
    noise = initial_noise(0, range(64), (8, 8, 4))
    np.testing.assert_array_equal(noise[5:7], initial_noise(0, [5, 6], (8, 8, 4)))
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert not np.array_equal(noise, initial_noise(1, range(64), (8, 8, 4)))


@pytest.mark.slow
def test_generate_is_pure_and_differentiable(ours, rng):
    noise = rng.standard_normal((1, 8, 8, 4), np.float32)
    ids, null = ours.tokenizer.encode(["dog"]), ours.tokenizer.encode([""])[0]

    def brightness(noise):
        return sbv2_jax.generate(ours.generator, ours.params, ids, null, noise).mean()

    gradient = jax.jit(jax.grad(brightness))(noise)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": ["a dog", " "]}, "prompt 2 of 2 is empty"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["dog"], "noise": np.ones((1, 4, 4, 4), np.float32)}, "expected"),
        ({"prompts": ["dog"], "noise": np.ones((1, 8, 8, 4), np.float64)}, "float64"),
        ({"prompts": ["dog"], "noise": np.full((1, 8, 8, 4), np.nan, np.float32)}, "finite"),
        ({"prompts": ["dog"], "steps": 2, "sampler": "euler"}, "euler"),
        ({"prompts": ["dog"], "steps": 0}, "steps=0: a whole number >= 1"),
        ({"prompts": ["dog"], "steps": 4.0}, r"steps=4\.0: a whole number"),
        ({"prompts": ["dog"], "steps": True}, "steps=True: a whole number"),
        ({"prompts": ["dog"], "seed": -1}, "seed=-1: a whole number from 0 to 4294967295"),
        ({"prompts": ["dog"], "seed": 2**32}, "seed=4294967296: a whole number"),
        ({"prompts": ["dog"], "guidance": float("nan")}, "guidance=nan: a finite number"),
        ({"prompts": ["dog"], "guidance": float("inf")}, "guidance=inf: a finite number"),
        ({"prompts": ["dog"], "guidance": None}, "guidance=None: a finite number"),
    ],
)
def test_bad_calls_are_one_clear_line(ours, call, message):
    with pytest.raises(InputError, match=message) as error:
        ours.draw(call.pop("prompts"), **call)
    assert "\n" not in str(error.value)


def test_drawing_goes_on_where_it_stopped_and_repeats_given_noise(directory, tmp_path, rng):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na red apple\ndog\n")
    out = tmp_path / "pictures"
    common = {"prompts": [], "prompts_file": str(prompts), "batch_size": 2, **SETTINGS}
    draw(functools.partial(drawn_of, str(directory)), str(out), **common)
    files = sorted(out.glob("*.png"))
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    draw(functools.partial(drawn_of, str(directory)), str(out), **common)
    difference = np.asarray(Image.open(files[1]), int)
    files[1].write_bytes(before[1])
    assert np.abs(difference - np.asarray(Image.open(files[1]), int)).max() <= 1

    noise = rng.standard_normal((3, 8, 8, 4), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    sheet = tmp_path / "sheet.png"
    draw(
        functools.partial(drawn_of, str(directory)),
        str(sheet),
        **common | {"noise_file": str(tmp_path / "noise.npy")},
    )
    assert Image.open(sheet).size == (64, 64)


def test_a_negative_prompt_with_guidance_is_that_of_diffusers(ours, directory, rng):
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(directory)
    theirs.set_progress_bar_config(disable=True)
    settings = {"latents": nchw(noise), "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    want = theirs(PROMPTS, negative_prompt=["an apple"] * 2, **settings).images
    got = ours.draw(PROMPTS, noise=noise, steps=4, guidance=3.0, sampler="ddim", negative_prompt="an apple")
    assert np.abs(got / 255.0 - want).max() < 2 / 255
    assert np.abs(theirs(PROMPTS, **settings).images - want).max() > 10 / 255


class Away:
    """NASA (SNOOPI), as a processor of diffusers' attention: what is attended to the other context is taken away."""

    def __init__(self, away: torch.Tensor, scale: float):
        self.away, self.scale, self.plain = away, scale, AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        project, attn.to_out = attn.to_out, torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        context, away = (self.plain(attn, hidden_states, one) for one in (encoder_hidden_states, self.away))
        attn.to_out = project
        return project[1](project[0](context - self.scale * away))


@pytest.mark.parametrize("scale", [0.25, 1.5])
def test_without_guidance_attention_is_steered_away_from_the_negative_prompt(ours, directory, rng, scale):
    noise = rng.standard_normal((2, 8, 8, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(directory)
    away = theirs.encode_prompt(["an apple"] * 2, "cpu", 1, False)[0]
    attentions = theirs.unet.attn_processors
    theirs.unet.set_attn_processor(
        {name: Away(away, scale) if ".attn2." in name else one for name, one in attentions.items()}
    )
    theirs.scheduler = DDPMScheduler.from_config(one_step_scheduler(ours.parts.scheduler))
    theirs.set_progress_bar_config(disable=True)
    settings = {"latents": nchw(noise), "num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    want = theirs(PROMPTS, **settings).images
    got = ours.draw(PROMPTS, noise=noise, negative_prompt="an apple", negative_scale=scale)
    assert np.abs(got / 255.0 - want).max() < 2 / 255
    assert np.abs(ours.draw(PROMPTS, noise=noise) / 255.0 - want).max() > 5 / 255
    assert np.abs(ours.draw(PROMPTS, noise=noise, negative_prompt="an apple", negative_scale=0.0)
                  - ours.draw(PROMPTS, noise=noise).astype(int)).max() <= 1  # fmt: skip


def test_another_size_is_that_of_diffusers(ours, directory, rng):
    noise = rng.standard_normal((2, 4, 12, 4), np.float32)
    theirs = TorchPipeline.from_pretrained(directory)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    want = theirs(PROMPTS, latents=nchw(noise), height=16, width=48, **settings).images
    got = ours.draw(PROMPTS, noise=noise, height=16, width=48, steps=4, guidance=3.0, sampler="ddim")
    assert got.shape == (2, 16, 48, 3) and np.abs(got / 255.0 - want).max() < 2 / 255


@pytest.mark.slow
def test_other_batches_and_strengths_are_drawn_by_the_same_program(ours):
    program = ours._program(2, "ddim")
    before = program._cache_size()
    for count, guidance in ((5, 2.0), (8, 3.5), (7, 4.0)):
        pictures = ours.draw(["dog"] * count, steps=2, guidance=guidance, sampler="ddim")
        assert len(pictures) == count
    assert program._cache_size() == before + 1


DEVICES = """
import sys
import jax, numpy as np, sbv2_jax
pipeline = sbv2_jax.load(sys.argv[1])
pictures = pipeline.draw(["dog", "a red apple"] * 4, seed=3)
(row,) = {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(pipeline.params)}
assert jax.device_count() == 4 and row
batch = pipeline._batch(np.zeros((8, 2), np.float32))
assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 2)] * 4
np.save(sys.argv[2], pictures)
"""


@pytest.mark.slow
def test_all_devices_draw_the_pictures_of_one(ours, directory, tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    found = tmp_path / "pictures.npy"
    done = forks().run(["-c", DEVICES, str(directory), str(found)], ROOT, {"XLA_FLAGS": flags})
    assert done.code == 0, done.said
    want = ours.draw(["dog", "a red apple"] * 4, seed=3)
    assert np.abs(np.load(found).astype(int) - want).max() <= 1
