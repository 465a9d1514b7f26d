"""The metrics that tell the health of a run, and the x0 that stand beside its pictures."""

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace

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
from sbv2_jax.distill.terms.term import Term
from sbv2_jax.models import lora
from sbv2_jax.run import build, predictions
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


def method(rates: dict, terms: Sequence[Term] = (), updates: dict | None = None) -> SimpleNamespace:
    """What `Health` reads of a method: players with these rates, and terms."""
    players = {
        name: SimpleNamespace(name=name, rate=rate, updates=(updates or {}).get(name, 1))
        for name, rate in rates.items()
    }
    return SimpleNamespace(players=players, terms=terms)


def at(count: int) -> dict:
    """A state whose optimizer has made so many updates."""
    return {"student_opt": ({"count": jnp.int32(count), "mu": jnp.ones(3)},), "score_opt": {"count": 7}}


def test_rates_are_those_of_the_updates_that_were_made():
    """A rise over 4 updates, then a cosine over 6; a step that is skipped updates nothing."""
    changes = {"optimizer.warmup": 4, "optimizer.schedule": "cosine", "score.updates_per_step": 3}
    config = configuration(**changes)
    rates = {"student": build._rate(config, 1e-3, 1), "score": build._rate(config, 1e-2, 3)}
    health = Health(method(rates, updates={"score": 3}), at(2))
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
    found = Health(method({}), at(0)).metrics(6, 1.0, skipped=False)
    assert found["memory/device_gib"] == 3 and 0.5 < found["memory/host_gib"] < 200
    assert ballast.sum() == 2**26


def test_weights_are_those_of_the_terms_that_the_run_has_whoever_wrote_them():
    class Rising(Term):
        """One of the user's own, in arrays."""

        name = "rising"

        def weight(self, step):
            return 0.25 * jnp.minimum(step, 2)

    health = Health(method({}, [Term(), Rising()]), at(0))
    found = [health.metrics(step, 1.0, skipped=False) for step in (1, 2, 3, 4)]
    assert [one["rising/weight"] for one in found] == [0.0, 0.25, 0.5, 0.5]
    assert [name for name in found[0] if name.endswith("/weight")] == ["rising/weight"]


def test_rates_are_those_of_the_players_that_the_run_has_whoever_wrote_them():
    health = Health(
        method({"judge": lambda update: 0.5 * update, "silent": None}, updates={"judge": 2}), at(3)
    )
    assert health.metrics(4, 1.0, skipped=False)["lr/judge"] == 3.0
    assert "lr/silent" not in health.metrics(5, 1.0, skipped=False)


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
