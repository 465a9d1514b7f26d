"""Several updates of the score model in a step: each further one on prompts, noise and samples of its own."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
import toy_world
from conftest import relative_error
from toy_world import BATCH, Toy, changed, drawn_afresh

from sbv2_jax.distill.gradients import (
    FRESH,
    encode,
    follower_gradient,
    fresh_inputs,
    random_numbers,
    student_gradient,
)
from sbv2_jax.distill.random_numbers import keys_of_updates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy():
    return Toy()


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_random_numbers_of_an_update_depend_on_the_seed_the_step_and_its_number_alone():
    one = drawn_afresh(5, 1, count=2)
    assert_same(one, drawn_afresh(5, 1, count=4))
    for other in (
        drawn_afresh(5, 0, count=2),
        drawn_afresh(6, 1, count=2),
        drawn_afresh(5, 1, count=2, seed=1),
    ):
        assert np.all(other[0] != one[0]) and np.all(other[1].noise != one[1].noise)


def test_several_score_updates_are_each_on_fresh_noise_prompts_and_samples(toy):
    """One after the other: two on samples of their own, then the student's, then one on the student's samples."""
    batch = toy.batch | toy.fresh
    three, metrics = toy.train_step(score__updates=3)(toy.init(), toy.frozen, batch)
    assert optax.tree.get(three.players["score"].opt, "count") == 3
    assert optax.tree.get(three.players["student"].opt, "count") == 1
    method = changed(toy.method, score__updates=3)
    player = method.players["score"]

    @jax.jit
    def one_after_the_other(state):
        own, others = random_numbers(method, state.key, 0, BATCH)
        conditions = encode(method, toy.frozen, toy.batch)
        (score, opt), values, norms, samples = state.players["score"], [], [], []

        def update(x, text, noise, score, opt):
            grads, found = follower_gradient(player, score, toy.frozen, x, text, noise)
            updates, opt = toy.optimizer.update(grads, opt, score)
            values.append(found["loss/score"])
            norms.append(optax.global_norm(grads))
            samples.append(x)
            return optax.apply_updates(score, updates), opt

        keys = keys_of_updates(state.key, 0, 2)
        for key, ids in zip(keys, batch[FRESH], strict=True):
            z, text, noise = fresh_inputs(method, player, key, toy.frozen, ids)
            x = method.student.forward(state.student, toy.frozen, z, text)
            score, opt = update(x, text, noise, score, opt)
        moved = dataclasses.replace(
            state, players=state.players | {"score": state.players["score"]._replace(params=score)}
        )
        grads, x, _ = student_gradient(method, moved, toy.frozen, conditions, own)
        score, _ = update(x, conditions.text, others["score"], score, opt)
        updates, _ = toy.optimizer.update(grads, state.players["student"].opt, state.student)
        student = optax.apply_updates(state.student, updates)
        return student, score, samples, {"loss/score": values, "grad_norm/score": norms}

    student, score, samples, found = one_after_the_other(toy.init())
    for name, leaf in student.items():
        assert relative_error(three.student[name], leaf) < 1e-5
    for name, leaf in score.items():
        assert relative_error(three.players["score"].params[name], leaf) < 1e-5
    for name, values in found.items():
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-5, err_msg=name)
    assert all(np.all(a != b) for a, b in itertools.combinations(samples, 2)), "no sample is seen twice"


def test_each_of_the_prompts_of_a_step_trains_the_score(toy):
    """Another prompt in any of its batches gives another score model."""
    step = toy.train_step(score__updates=3, score__null_prompt_probability=0.0)

    def after(batch):
        return step(toy.init(), toy.frozen, batch)[0].players["score"].params

    first = after(toy.batch | toy.fresh)
    for update, row in ((0, 0), (0, BATCH - 1), (1, 3)):
        ids = toy.fresh[FRESH].copy()
        ids[update, row] = (ids[update, row] + 1) % toy_world.VOCABULARY
        other = after(toy.batch | {FRESH: ids})
        assert all(np.any(other[name] != leaf) for name, leaf in first.items()), (update, row)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_fresh_batch_that_gives_nan_skips_the_step(toy, passes):
    text = toy.frozen["text_encoder"]
    poisoned = {"table.embedding": text["table.embedding"].at[toy_world.VOCABULARY - 1].set(np.nan)}
    ids = toy.fresh[FRESH].copy()
    ids[1, 2, 1] = toy_world.VOCABULARY - 1
    step = toy.train_step(score__updates=3, score__null_prompt_probability=0.0, accumulate=passes)
    before = toy.init()
    after, metrics = step(before, toy.frozen | {"text_encoder": poisoned}, toy.batch | {FRESH: ids})
    assert metrics["skipped"] == 1.0 and not np.isfinite(metrics["loss/score"])
    assert_same(dataclasses.replace(after, step=before.step), before)
