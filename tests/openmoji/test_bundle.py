"""The bundled pipeline: diffusers loads it and draws what we draw, and its pictures are what their captions say."""

import functools

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from parity import nchw

import sbv2_jax
from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.models.registry import network
from sbv2_jax.models.tokenizer import load_tokenizer
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.pretrain.clip import accuracy

pytestmark = pytest.mark.slow

CANDIDATES = 64


@pytest.fixture(scope="module")
def directory():
    return resolve("bundled")


@pytest.fixture(scope="module")
def pipeline():
    return sbv2_jax.load("bundled")


@pytest.fixture(scope="module")
def right_captions(directory):
    """The function from pictures to the share whose own caption CLIP prefers to the others."""
    clip = load_component(directory / "clip", dtype="float32")
    ids = load_tokenizer(directory / "tokenizer").encode(captions())
    size = clip.config.vision_config.image_size
    return functools.partial(accuracy, network(clip.config), clip.params, ids, size)


def captions():
    return [prompt.caption for prompt in openmoji.prompts("seen", CANDIDATES, "test")]


def test_it_is_small_and_says_whose_drawings_it_learnt(directory):
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) <= 40 * 10**6
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in card and "All emojis designed by OpenMoji" in card


def test_diffusers_draws_the_same_pictures_in_25_steps(directory, pipeline, rng):
    prompts = captions()[:2]
    noise = rng.standard_normal((2, *pipeline.latent_shape), np.float32)
    theirs = DiffusionPipeline.from_pretrained(directory)
    theirs.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        want = theirs(
            prompts, latents=nchw(noise), num_inference_steps=25, guidance_scale=3.0, output_type="np"
        ).images
    got = pipeline.draw(prompts, noise=noise, steps=25, guidance=3.0, sampler="ddim")
    assert got.std() > 40
    assert np.abs(got / 255.0 - want).max() < 2 / 255


def test_clip_tells_the_captions_of_real_pictures_and_of_samples(right_captions, pipeline):
    real = np.stack([prompt.reference() for prompt in openmoji.prompts("seen", CANDIDATES, "test")])
    samples = pipeline.draw(captions(), steps=10, guidance=3.0)
    one_step = pipeline.draw(captions())
    assert right_captions(real) > 0.9
    assert right_captions(samples) > 0.85  # a guess is right in 1 of 64
    assert right_captions(one_step) < right_captions(samples)  # what distillation is for
