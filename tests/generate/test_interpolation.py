"""Ways between noises and prompts: the arc's own formula in NumPy, its ends, and the pictures along it."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.errors import InputError
from sbv2_jax.generate.interpolation import between_noises, slerp

PROMPTS = ("a red apple", "dog")


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def ours(request, tmp_path_factory):
    return sbv2_jax.load(write_pipeline(tmp_path_factory.mktemp("between"), xl=request.param))


def test_it_is_the_arc_in_the_plane_of_both(rng):
    first, second = rng.standard_normal((2, 5, 7))
    share = rng.uniform(size=5)
    unit = first / np.linalg.norm(first, axis=-1, keepdims=True)
    other = second - (second * unit).sum(-1, keepdims=True) * unit
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    same = (
        second
        / np.linalg.norm(second, axis=-1, keepdims=True)
        * np.linalg.norm(first, axis=-1, keepdims=True)
    )
    angle = np.arctan2((same * other).sum(-1), (same * unit).sum(-1)) * share
    want = (np.cos(angle)[:, None] * unit + np.sin(angle)[:, None] * other) * np.linalg.norm(
        first, axis=-1, keepdims=True
    )
    assert relative_error(slerp(jnp.asarray(first), jnp.asarray(same), share), want) < 1e-5


def test_the_ends_are_exact_and_parallel_vectors_give_the_line(rng):
    first, second = (jnp.asarray(one) for one in rng.standard_normal((2, 3, 4)).astype(np.float32))
    assert relative_error(slerp(first, second, np.zeros(3)), first) < 1e-6
    assert relative_error(slerp(first, second, np.ones(3)), second) < 1e-6
    assert relative_error(slerp(first, 2 * first, np.full(3, 0.25)), 1.25 * first) < 1e-6
    assert (
        np.isfinite(slerp(first, -first, np.full(3, 0.5))).all()
        and np.isfinite(slerp(0 * first, second, np.ones(3))).all()
    )


def test_noise_between_is_as_long_as_noise(rng):
    first, second = (jnp.asarray(one) for one in rng.standard_normal((2, 16, 16, 4)).astype(np.float32))
    found = between_noises(first, second, jnp.linspace(0, 1, 5))
    assert found.shape == (5, 16, 16, 4) and np.allclose(np.std(found, axis=(1, 2, 3)), 1, atol=0.05)
    assert np.std((first + second) / 2) < 0.75


@pytest.mark.slow
def test_the_pictures_at_the_ends_are_those_of_the_prompts_and_seeds(ours):
    pictures = ours.between(PROMPTS, [0.0, 0.3, 0.6, 1.0], seeds=(3, 4))
    for end, prompt, seed in ((0, PROMPTS[0], 3), (3, PROMPTS[1], 4)):
        want = ours.draw([prompt], seed=seed)[0]
        assert np.abs(pictures[end].astype(int) - want).max() <= 1
    assert all(np.abs(pictures[one].astype(int) - pictures[one + 1]).mean() > 1 for one in range(3))
    still = ours.between(PROMPTS, [0.0, 0.5, 1.0], seeds=(3, 9), noise_shares=[0.0] * 3)
    assert np.abs(still[2].astype(int) - ours.draw([PROMPTS[1]], seed=3)[0]).max() <= 1


@pytest.mark.parametrize("shares", [([0.0, 1.5], None), ([float("nan")], None), ([0.5], [0.5, 1.0])])
def test_shares_that_are_none_are_refused(ours, shares):
    with pytest.raises(InputError, match="from 0 to 1"):
        ours.between(PROMPTS, shares[0], noise_shares=shares[1])
