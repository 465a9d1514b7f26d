"""The clamped reward: the clamped CLIP loss, which test_steps.py proves against PyTorch, of a network of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
from conftest import relative_error

from sbv2_jax.distill.gradients import encode, pull

STEP = 3
CLIP = {"clip.weight": 2.0, "clip.tau": 0.6}
REWARD = {"reward.weight": 2.0, "reward.tau": 0.6, "terms": ("vsd", "clip", "reward")}


def pulled(changes, other_reward=False):
    """Returns d loss / d x without the VSD term, and the metrics, of the same random samples."""
    world = tiny_world.make_world(changes)
    frozen, method = world.frozen, world.run.method
    method = dataclasses.replace(method, terms=tuple(term for term in method.terms if term.name != "vsd"))
    if other_reward:
        noise = np.random.default_rng(9)
        frozen["reward"] = {
            name: leaf + 0.3 * leaf.std() * noise.standard_normal(leaf.shape, np.float32)
            for name, leaf in frozen["reward"].items()
        }
    batch_size = len(world.batch["input_ids"])
    x = jax.random.normal(jax.random.key(1), (batch_size, *method.latent_shape))
    conditions = encode(method, frozen, world.batch)
    dx, metrics = jax.jit(lambda x: pull(method, jnp.asarray(STEP), {}, frozen, x, conditions, {}, {}))(x)
    return np.asarray(dx), {name: float(value) for name, value in metrics.items()}


def test_the_reward_of_a_clip_pulls_as_the_clip_loss_of_it_does():
    clip, of_clip = pulled(CLIP)
    reward, of_reward = pulled(REWARD)
    assert of_clip.keys() == {"loss/clip", "clip/cosine", "clip/clamped"} and of_clip["loss/clip"] > 0.01
    renamed = {"loss/clip": "loss/reward", "clip/cosine": "reward/cosine", "clip/clamped": "reward/clamped"}
    assert of_reward == {renamed[name]: value for name, value in of_clip.items()}
    np.testing.assert_array_equal(reward, clip)


@pytest.mark.slow
def test_both_pull_together_each_with_a_network_weight_and_clamp_of_its_own():
    clip, _ = pulled(CLIP)
    changes = REWARD | {"reward.weight": 5.0, "reward.tau": 0.9}
    reward, of_reward = pulled(changes, other_reward=True)
    both, metrics = pulled(CLIP | changes, other_reward=True)
    assert relative_error(both, clip + reward) < 1e-6
    assert relative_error(reward, clip) > 0.1
    assert metrics["loss/reward"] == pytest.approx(of_reward["loss/reward"], rel=1e-6)
    assert metrics["loss/reward"] != pytest.approx(metrics["loss/clip"], rel=0.05)
