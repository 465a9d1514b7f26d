"""The optimizers' own options, beside what the steps of test_steps.py prove against PyTorch."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sbv2_jax.distill.optimizers import adamw, learning_rate


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rates_rise_and_fall_as_they_should(schedule, warmup):
    rate = learning_rate(2e-3, schedule, warmup, 20)
    for step in range(21):
        share = min(1.0, step / warmup) if warmup else 1.0
        if schedule == "cosine" and step > warmup:
            share = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (20 - warmup))
        assert float(rate(step)) == pytest.approx(2e-3 * share, rel=1e-5, abs=1e-10), step


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_the_first_moment_is_stored_in_fewer_bits(dtype, rng):
    params = {"kernel": jnp.asarray(rng.standard_normal((30, 20)), jnp.float32)}
    options = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}
    optimizer = adamw(optax.constant_schedule(1e-2), **options, mu_dtype=dtype)
    exact = adamw(optax.constant_schedule(1e-2), **options)
    state, want_state = optimizer.init(params), exact.init(params)
    for _ in range(3):
        grads = {"kernel": jnp.asarray(rng.standard_normal((30, 20)), jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        want, want_state = exact.update(grads, want_state, params)
    moments = optax.tree.get(state, "ScaleByAdamState")
    assert moments.mu["kernel"].dtype == dtype and moments.nu["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(updates["kernel"], want["kernel"], atol=1e-4 if dtype == jnp.bfloat16 else 0)
    assert np.abs(want["kernel"]).max() > 5e-3
