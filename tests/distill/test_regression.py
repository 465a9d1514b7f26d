"""The regression on pairs: its gradient against autograd's, its rows, and a step that has no other term."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
import torch
from conftest import relative_error
from step_reference import make_reference, torch_ids, torch_start
from torch_reference import nchw

from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.devices.programs import Separate
from sbv2_jax.distill.gradients import encode, random_numbers, started, student_gradient
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.distill.terms.regression import regression_loss
from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.run.batches import abstract_batch

pytestmark = pytest.mark.slow

BOUND = 1e-4
ALONE = {"terms": ("regression",), "pairs.path": "drawn at random", "pairs.share": 0.5, "pairs.weight": 0.7}
PAIRED = np.array([1, 3])  # of four rows
# Of the steps, which are compiled in three ways.
UNET = tiny_world.UNET | tiny_world.ONE_LEVEL | {"block_out_channels": [16]}


@pytest.fixture(scope="module")
def world():
    return tiny_world.make_world(ALONE, student_prediction="v_prediction")


def drawn(world):
    """The random numbers of the first step, with the pairs' noise in their rows."""
    method = world.run.method
    noise, followers = jax.jit(
        lambda key, batch: (lambda own: (started(method, batch, own[0]), own[1]))(
            random_numbers(method, key, 0, tiny_world.BATCH)
        )
    )(world.init().key, world.batch)
    assert followers == {}
    return noise


def test_z_is_the_pairs_noise_in_their_rows_and_the_steps_own_in_the_others(world):
    z, batch = drawn(world).z, world.batch
    assert (np.flatnonzero(batch["pair_numbers"] >= 0) == PAIRED).all()
    numbers = [int(number) for number in batch["pair_numbers"][PAIRED]]
    assert relative_error(z[PAIRED], initial_noise(17, numbers, tiny_world.LATENTS)) < 1e-6
    root = jax.random.key(17)
    for row, number in zip(PAIRED, numbers, strict=True):
        own = jax.random.normal(jax.random.fold_in(root, number), tiny_world.LATENTS)
        assert relative_error(z[row], own) < 1e-6
    plain = random_numbers(world.run.method, world.init().key, 0, tiny_world.BATCH)[0].z
    others = np.delete(np.arange(tiny_world.BATCH), PAIRED)
    assert relative_error(z[others], plain[others]) < 1e-6
    assert not np.any(np.isclose(z[PAIRED], plain[PAIRED], atol=1e-6).all((1, 2, 3)))


def test_the_gradient_to_the_student_equals_autograd(world):
    method, noise = world.run.method, drawn(world)

    @jax.jit
    def ours(state, frozen, batch, noise):
        return student_gradient(method, state, frozen, encode(method, frozen, batch), noise)

    grads, _, metrics = ours(world.init(), world.frozen, world.batch, noise)

    reference = make_reference(world, {"student_prediction": "v_prediction"})
    x = reference.generate(torch_start(noise.z), reference.encode(torch_ids(world)[0]))
    want = torch.nn.functional.mse_loss(x[PAIRED], nchw(world.batch["pair_latents"])[PAIRED])
    (0.7 * want).backward()
    theirs = {name: p.grad.numpy() for name, p in reference.student.named_parameters()}
    assert float(metrics["loss/regression"]) == pytest.approx(want.item(), rel=BOUND)
    got = params_to_torch(grads)
    assert got.keys() == theirs.keys()
    for name, grad in theirs.items():
        if np.abs(grad).max() > 1e-12:  # a bias before a normalisation has none
            assert relative_error(got[name], grad) < BOUND, name


def test_the_loss_is_the_mean_of_each_samples_squares(rng):
    x, y = (rng.standard_normal((3, 4, 4, 2), np.float32) for _ in range(2))
    want = [torch.nn.functional.mse_loss(torch.tensor(a), torch.tensor(b)) for a, b in zip(x, y, strict=True)]
    assert relative_error(regression_loss(jnp.asarray(x), jnp.asarray(y)), want) < 1e-6


def test_a_step_of_the_regression_alone_trains_the_student_in_any_passes_and_stages():
    """No score model is there; the mean over the pairs is that of the passes, whichever pass the pairs are in."""
    world = tiny_world.make_world(ALONE, unet=UNET)
    method, run = world.run.method, world.run
    assert method.followers == () and list(run.state_shapes.players) == ["student"]
    state = world.init()
    results = []
    for passes in (1, 2):
        step = make_train_step(dataclasses.replace(method, accumulate=passes))
        results.append(jax.jit(step)(state, world.frozen, world.batch))
    (one, metrics), (two, again) = results
    assert metrics.keys() == {
        "loss/regression", "grad_norm/student", "latents/std", "skipped",
    } and metrics["skipped"] == 0  # fmt: skip
    for name in metrics.keys() - {"skipped"}:
        assert float(again[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    moved = {name: np.abs(one.student[name] - leaf).max() for name, leaf in world.student.items()}
    assert min(moved.values()) > 0

    programs = Separate()
    step = make_train_step(method, programs=programs)
    shapes = jax.tree.map(functools.partial(jax.eval_shape, jnp.asarray), (state, world.frozen))
    step(*shapes, abstract_batch(tiny_world.BATCH, run))
    _, staged = step(state, world.frozen, jax.tree.map(jnp.asarray, world.batch))
    for name in metrics.keys() - {"skipped"}:
        assert float(staged[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
