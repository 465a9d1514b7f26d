"""The metrics that tell the health of a run, and the x0 that stand beside its pictures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline as TorchPipeline
from parity import nchw
from tiny_pipeline import write_world

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.devices.sharding import shardings
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.models import lora
from sbv2_jax.run import predictions
from sbv2_jax.run.arrays import load_frozen, load_state, place
from sbv2_jax.run.compilation import lay_out
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.generators import student_generator
from sbv2_jax.run.health import Health

PROMPTS = ["a red apple", "dog"]


def configuration(**changes):
    config = default_config()
    config.update_from_flattened_dict({"steps": 10, "student.lr": 1e-3, "score.lr": 1e-2, **changes})
    return config


def at(count: int) -> dict:
    """A state whose optimizer has made so many updates."""
    return {"student_opt": ({"count": jnp.int32(count), "mu": jnp.ones(3)},), "score_opt": {"count": 7}}


def test_rates_are_those_of_the_updates_that_were_made():
    """A rise over 4 updates, then a cosine over 6; a step that is skipped updates nothing."""
    changes = {"optimizer.warmup": 4, "optimizer.schedule": "cosine", "score.updates_per_step": 3}
    health = Health(configuration(**changes), at(2))
    want = [0.5, 0.75, 0.75, 1.0, 0.5 * (1 + math.cos(math.pi / 6))]
    for step, (share, skipped) in enumerate(zip(want, (False, True, False, False, False), strict=True), 4):
        found = health.metrics(step, 0.25, skipped=skipped)
        assert found["lr/student"] == pytest.approx(share * 1e-3, rel=1e-5)
        assert found["lr/score"] == pytest.approx(share * 1e-2, rel=1e-5)
        assert found["seconds_per_step"] == 0.25 and "clip/weight" not in found


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}

    ballast = np.ones(2**26)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2**30), Device(3 * 2**30), Device(5)])
    found = Health(configuration(**{"clip.model": "x", "clip.weight": 0.2}), at(0)).metrics(
        6, 1.0, skipped=False
    )
    assert found["memory/device_gib"] == 3 and 0.5 < found["memory/host_gib"] < 200
    assert found["clip/weight"] == pytest.approx(0.2 * 0.5) and ballast.sum() == 2**26


def test_a_constant_clip_weight_is_logged_as_it_is():
    changes = {"clip.model": "x", "clip.weight": 0.2, "clip.schedule": "constant"}
    assert Health(configuration(**changes), at(0)).metrics(6, 1.0, skipped=False)["clip/weight"] == 0.2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on the tiny pipeline, its score model no longer the teacher's."""
    world = write_world(tmp_path_factory.mktemp("world"))
    config = default_config()
    config.update(teacher=str(world / "pipeline"), prompts=str(world / "prompts.txt"), batch_size=4)
    config.score.update(rank=2, alpha=3.0, targets=r".*\.attn[12]\.to_(q|v)")
    config.vsd.update(guidance=3.0, score_guidance=2.0)
    _, run, layout = lay_out(config, read_parts(config), jax.devices()[:1], None)
    frozen = load_frozen(run, run.parts.tokenizer.encode([""])[0], layout.frozen)
    state = load_state(run, layout.state)
    rng = np.random.default_rng(2)
    score = {
        name: leaf + rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in state.players["score"].params.items()
    }
    moved = state.players["score"]._replace(params={name: jnp.asarray(leaf) for name, leaf in score.items()})
    state = dataclasses.replace(state, players=state.players | {"score": moved})
    vae = place(
        load_component(run.parts.vae.directory, dtype=jnp.float32).params,
        shardings(student_generator(run).vae.shapes, layout.mesh),
    )
    return world, run, frozen, state, vae


def test_teacher_and_score_predict_what_diffusers_does(made):
    world, run, frozen, state, vae = made
    z, noise = (np.asarray(initial_noise(seed, range(2), (8, 8, 4))) for seed in (0, 1))
    ids = run.parts.tokenizer.encode(PROMPTS)
    found = jax.jit(lambda *inputs: predictions.predicted(run, *inputs, at=predictions.times(run)))(
        state, frozen, vae, ids, z, noise
    )
    assert predictions.times(run) == (250, 500, 750) and found.shape == (2, 3, 2, 32, 32, 3)

    pipe = TorchPipeline.from_pretrained(world / "pipeline")
    abar = pipe.scheduler.alphas_cumprod
    embed = [
        pipe.encode_prompt(texts, "cpu", 1, False)[0] for texts in (PROMPTS, [""] * 2)
    ]  # fmt: skip

    def epsilon(x, t, text):
        return pipe.unet(x, t, text).sample

    def x0(x, eps, t):
        return (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()

    def predict(x, t, guidance):
        without, with_ = epsilon(x, t, embed[1]), epsilon(x, t, embed[0])
        return x0(x, without + guidance * (with_ - without), t)

    with torch.no_grad():
        z, noise = nchw(z), nchw(noise)
        x = x0(z, epsilon(z, 999, embed[0]), 999)

        def pictures(guidance):
            for t in (250, 500, 750):
                x_t = abar[t].sqrt() * x + (1 - abar[t]).sqrt() * noise
                latents = predict(x_t, t, guidance) / pipe.vae.config.scaling_factor
                yield (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)

        teacher = np.stack(list(pictures(3.0)))
        trained = state.players["score"].params
        down, up = (
            {name.removesuffix(f".lora.{end}.kernel"): np.asarray(leaf) for name, leaf in trained.items()
             if f".lora.{end}" in name}
            for end in ("down", "up")
        )  # fmt: skip
        assert down.keys() == up.keys() and len(down) > 3
        for module, layer in pipe.unet.named_modules():
            if module in down:
                layer.weight += torch.from_numpy((1.5 * down[module] @ up[module]).T.copy())
        score = np.stack(list(pictures(2.0)))
    assert teacher.std() > 0.1 and np.abs(teacher - score).max() > 0.1
    assert np.abs(np.asarray(found[0]) - teacher).max() < 2e-3
    assert np.abs(np.asarray(found[1]) - score).max() < 2e-3
    assert all(lora.is_lora(name) for name in state.players["score"].params)
