"""The parts of pre-training: the tokenizer, the world, the losses, the loop and its optimizer."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from ml_collections import ConfigDict
from tiny_pretraining import tiny_config

from sbv2_jax import checkpoint
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import load_tokenizer
from sbv2_jax.openmoji import scenes
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.draws import uniforms
from sbv2_jax.openmoji.pretrain import loop, losses, settings, unet
from sbv2_jax.openmoji.pretrain.dataset import open_world
from sbv2_jax.openmoji.pretrain.stages import Stages
from sbv2_jax.openmoji.pretrain.tokenizer import train_tokenizer
from sbv2_jax.run.preemption import Preempted

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def training(**changes) -> ConfigDict:
    """The settings of a stage's training."""
    group = settings.default_config().vae
    group.update(changes)
    return group


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    captions = [openmoji.caption("train", index) for index in range(3000)]
    train_tokenizer(captions, directory, vocab_size=1500, max_length=32)
    return load_tokenizer(directory)


def test_tokenizer_knows_the_words_of_the_world(tokenizer):
    ids = tokenizer.encode(
        ["a large red apple on a blue background", "A LARGE red  apple on a blue background"]
    )
    assert ids.shape == (2, 32)
    assert np.array_equal(ids[0], ids[1])
    assert (ids[0] != tokenizer.eos_token_id).sum() <= 11  # start, eight words, and at most two cut in two
    assert tokenizer.vocab_size <= 1500
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.vocab_size - 1


@pytest.mark.parametrize("text", ["日本 ünïcode", "zyx'qw 123!?", "🍎", "a,b . c"])
def test_tokenizer_encodes_any_text_without_loss(tokenizer, text):
    ids = [i for i in tokenizer.encode([text])[0] if i < tokenizer.vocab_size - 2]
    # As with OpenAI's, where a word ends there is a space, whether the text had one or not.
    assert tokenizer._backend.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_tokenizer_can_be_saved_by_transformers_and_read_again(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer._backend.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a red apple")["input_ids"] == tokenizer._backend("a red apple")["input_ids"]


# The world


def test_world_is_drawn_once_and_another_one_is_refused(tmp_path, monkeypatch):
    world = open_world(tmp_path, pictures=12, phrasings=3, seed=0)
    assert world.pictures.shape == (12, 64, 64, 3)
    assert np.array_equal(world.pictures[5], openmoji.example("train", 5).image)
    assert world.captions[5][0] == openmoji.caption("train", 5)
    assert all(len(set(texts)) > 1 for texts in world.captions) and len(world.captions) == 12
    assert all(len(texts) == 3 for texts in world.captions)
    scene = scenes.scene("train", 5)
    assert world.captions[5][2] == scenes.caption(scene, uniforms(0, "caption", "train", 5, 2))
    shown = [scenes.scene("train", index).identity for index in range(12)]
    assert [sorted(set(shown))[number] for number in world.identities] == shown
    assert world.fingerprint == f"{openmoji.manifest(0)['sha256']}/12/3", (
        "as that of an older run, which resumes"
    )
    assert list(tmp_path.glob("open_moji/pretraining/*/*train.array_record*")), "the builder's own files"
    monkeypatch.setattr(openmoji, "example", None)  # would fail if it drew again
    again = open_world(tmp_path, pictures=12, phrasings=3, seed=0)
    assert np.array_equal(again.pictures, world.pictures)
    with pytest.raises(InputError, match="another world"):
        open_world(tmp_path, pictures=13, phrasings=3, seed=0)


def test_twins_lists_each_identity_in_one_run(tmp_path):
    world = open_world(tmp_path, pictures=40, phrasings=1, seed=0)
    twins = world.twins()
    assert sorted(twins["order"]) == list(range(40))
    for start, count in zip(twins["start"], twins["count"], strict=True):
        rows = twins["order"][start : start + count]
        assert len(set(world.identities[rows])) == 1
    assert twins["count"].sum() == 40


# The losses


def test_picture_loss_is_zero_for_itself_and_prefers_a_shift_in_brightness_to_blur(rng):
    sharp = np.where(rng.random((2, 16, 16, 3)) < 0.5, -0.5, 0.5).astype(np.float32)
    blurred = (sharp + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2) + np.roll(sharp, (1, 1), (1, 2))) / 4
    shifted = sharp + np.abs(blurred - sharp).mean()  # the same mean absolute error
    assert np.all(losses.picture_loss(jnp.asarray(sharp), jnp.asarray(sharp), 1.0) == 0)
    of = [losses.picture_loss(jnp.asarray(x), jnp.asarray(sharp), 1.0).mean() for x in (shifted, blurred)]
    assert of[0] < 0.6 * of[1]


def test_kl_divergence_equals_its_closed_form(rng):
    mean, log_variance = rng.standard_normal((2, 3, 2, 2, 4)).astype(np.float32)
    variance = np.exp(log_variance)
    expected = 0.5 * (variance + mean**2 - 1 - log_variance).reshape(3, -1).mean(1)
    assert relative_error(losses.kl_divergence(jnp.asarray(mean), jnp.asarray(log_variance)), expected) < 1e-6
    assert np.all(losses.kl_divergence(jnp.zeros((2, 4)), jnp.zeros((2, 4))) == 0)


def test_contrastive_loss_is_the_mean_of_both_cross_entropies(rng):
    logits = rng.standard_normal((5, 5)).astype(np.float32)

    def cross_entropy(rows):
        return -np.log(np.exp(np.diag(rows)) / np.exp(rows).sum(1))

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    assert relative_error(losses.contrastive_loss(jnp.asarray(logits)), expected) < 1e-6


def test_velocity_loss_weighs_x0_by_the_limited_snr_plus_one(rng):
    schedule, t = unet.SCHEDULE, jnp.asarray([0, 300, 999], jnp.int32)
    x0, x_t, error = (jnp.asarray(rng.standard_normal((3, 4, 4, 2)), jnp.float32) for _ in range(3))
    a, s = (
        np.asarray(values)[np.asarray(t)][:, None, None, None] for values in (schedule.alpha, schedule.sigma)
    )
    off = (a * x_t - (x0 + error)) / s  # the v of a network whose x0 is wrong by `error`
    snr = (a / s).reshape(3) ** 2
    expected = (np.minimum(snr, 5.0) + 1) * np.square(error).mean((1, 2, 3))
    # At t = 0 the error in v is 34 times that in x0, which float32 cancels from numbers of that size.
    assert relative_error(losses.velocity_loss(schedule, off, x0, x_t, t, 5.0), expected) < 1e-4


# The loop


def quadratic(steps: int, **changes) -> tuple[loop.Stage, list[int]]:
    group = training(steps=steps, batch_size=4, lr=0.05, ema=0.5, checkpoint_every=3)
    seen = []

    def loss(params, inputs, key):
        target = inputs["target"] + 0.1 * jax.random.normal(key, (3,))
        value = jnp.square(params["x.kernel"] - target).mean()
        return value, {"loss/square": value}

    return (
        loop.Stage(
            name="quadratic",
            loss=loss,
            init=lambda: {"x.kernel": np.zeros(3, np.float32)},
            inputs={"target": np.arange(3, dtype=np.float32)},
            settings=group,
            preview=lambda params: seen.append(len(params)),
            fingerprint=changes.pop("fingerprint", "one"),
        ),
        seen,
    )


def shared_by(workdir: Path, **changes) -> loop.Shared:
    values = {"seed": 1, "cooldown": 0.5, "clip_norm": 1.0, "log_every": 2, "keep": 2}
    return loop.Shared(workdir=workdir, **values | changes)


def test_loop_logs_each_step_checkpoints_and_previews(tmp_path):
    stage, seen = quadratic(8)
    params = loop.train(stage, shared_by(tmp_path))
    assert np.all(params["x.kernel"][1:] > 0)
    lines = [json.loads(line) for line in (tmp_path / "quadratic" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {"loss/square", "grad_norm", "images_per_sec"} <= lines[0].keys()
    assert len(seen) == 3  # at 3, 6 and the last


def test_a_signal_while_the_last_preview_is_made_ends_the_run_all_the_same(tmp_path):
    stage = dataclasses.replace(quadratic(3)[0], preview=lambda params: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        loop.train(stage, shared_by(tmp_path))
    assert checkpoint.load(tmp_path / "quadratic" / "checkpoints")[0] == 3


def test_latents_that_are_kept_are_those_of_the_same_pictures(tmp_path):
    params = {"w": np.ones(1, np.float32)}

    def latents_of(brightness: int) -> np.ndarray:
        pictures = np.full((5, 2, 2, 3), brightness, np.uint8)
        world = SimpleNamespace(fingerprint=str(brightness), pictures=pictures)
        stages = Stages(tiny_config(), tmp_path, world, "a tokenizer")
        stages._encode = lambda params, pictures: np.asarray(pictures, np.float32)
        return stages._cached_means(params)

    assert latents_of(0).max() == 0 and latents_of(9).min() == 9 and latents_of(9).min() == 9


def test_loop_returns_a_complete_stage_without_a_step_and_refuses_other_settings(tmp_path):
    stage, _ = quadratic(6)
    first = loop.train(stage, shared_by(tmp_path))
    again, seen = quadratic(6)
    assert np.array_equal(loop.train(again, shared_by(tmp_path))["x.kernel"], first["x.kernel"])
    assert len(seen) == 1, "the process may have ended before the last preview"
    with pytest.raises(InputError, match="seed"):
        loop.train(again, shared_by(tmp_path, seed=2))
    with pytest.raises(InputError, match="data"):
        loop.train(quadratic(6, fingerprint="two")[0], shared_by(tmp_path))


def test_loop_can_be_prolonged(tmp_path):
    loop.train(quadratic(6)[0], shared_by(tmp_path))
    stage, seen = quadratic(9)
    loop.train(stage, shared_by(tmp_path))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.1), (9, 1.0), (50, 1.0), (80, 1.0), (90, 0.5), (100, 0)]
)
def test_learning_rate_rises_stays_and_falls(count, expected):
    group = training(steps=100, batch_size=1, lr=2.0, ema=0.5)
    group.warmup = 10
    assert float(loop.learning_rate(group, 0.2)(jnp.asarray(count))) == pytest.approx(2 * expected)


def test_kernels_take_orthogonal_updates_of_adams_size_and_the_rest_takes_adams(rng):
    group = training(steps=100, batch_size=1, lr=0.5, ema=0.5)
    group.warmup = 1
    optimizer = loop.make_optimizer(group, 0.2, 1e9)
    shapes = {
        "mid.conv1.kernel": (3, 3, 8, 24),
        "mid.to_q.kernel": (40, 16),
        "conv_in.kernel": (3, 3, 4, 8),
        "mid.norm.scale": (8,),
    }
    grads = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    params = jax.tree.map(jnp.ones_like, grads)
    update, _ = optimizer.update(grads, optimizer.init(params), params)
    for name, gradient in grads.items():
        if name in ("conv_in.kernel", "mid.norm.scale"):
            # Adam's first step is the sign; looking ahead adds b1 (1 - b1) / (1 - b1^2) of it.
            assert relative_error(update[name], -0.5 * (1 + 0.9 / 1.9) * np.sign(gradient)) < 1e-5
            continue
        columns = gradient.shape[-1]
        left, _, right = np.linalg.svd(np.asarray(gradient).reshape(-1, columns), full_matrices=False)
        size = 0.5 * 0.2 * np.sqrt(max(len(left), columns))  # a root mean square of 0.2 times the rate
        ours = -np.asarray(update[name]).reshape(-1, columns) / size
        # Five Newton-Schulz steps bring every singular value near 1, by design not nearer.
        turned = left.T @ ours @ right.T
        assert np.all(np.abs(np.diag(turned) - 1) < 0.35)
        assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-3


def test_a_batch_is_split_over_all_devices_and_the_step_is_the_same(tmp_path):
    script = """
import jax, jax.numpy as jnp, numpy as np
from sbv2_jax.openmoji.pretrain import loop
from sbv2_jax.openmoji.pretrain import settings
group = settings.default_config().vae
group.update(steps=9, batch_size=8, lr=0.1, ema=0.5)
group.warmup = 1
optimizer = loop.make_optimizer(group, 0.2, 1.0)
data = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
def loss(params, inputs, key):
    rows = loop.draw_rows(key, 8, inputs)
    jax.debug.inspect_array_sharding(rows, callback=lambda s: print("rows on", len(s.device_set)))
    error = inputs[rows] @ params["a.kernel"] - inputs[rows][:, :2]
    return jnp.square(error).mean(), {}
params = {"a.kernel": jnp.full((6, 2), 0.1)}
state = loop.StageState(step=jnp.zeros((), jnp.int32), params=params, opt=optimizer.init(params), ema=params)
state, data = jax.device_put((state, data), loop.everywhere())
step = jax.jit(loop.make_step(loss, optimizer, 0.5, 0))
for _ in range(3):
    state, _ = step(state, data)
print(np.asarray(state.params["a.kernel"]).tolist())
"""
    results = {}
    for count in (1, 4):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        *devices, weights = done.stdout.splitlines()
        assert set(devices) == {f"rows on {count}"}
        results[count] = np.asarray(json.loads(weights))
    assert np.ptp(results[1]) > 0.05
    assert relative_error(results[4], results[1]) < 1e-5
