"""The rules of a training step: what is drawn, averaged, skipped, repeated exactly; and that it learns at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import toy_world
from conftest import relative_error
from diffusers.training_utils import EMAModel
from toy_world import BATCH, Toy, changed, drawn_afresh

from sbv2_jax.diffusion.schedule import ScheduleConfig, make_schedule
from sbv2_jax.distill.ema import ema_decay
from sbv2_jax.distill.gradients import FRESH, encode, random_numbers, student_gradient
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.score import Score
from sbv2_jax.distill.state import init_state
from sbv2_jax.distill.student import Student
from sbv2_jax.distill.terms.vsd import VSD
from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.models.clip import TextOutput
from sbv2_jax.models.conditions import Text, TextEncoder
from sbv2_jax.tree import leaf_names

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture(scope="module")
def plain_step(toy):
    return toy.train_step(ema=0.9)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def run(step, toy, state, count=3):
    for _ in range(count):
        state, metrics = step(state, toy.frozen, toy.batch)
    return state, metrics


def trained(state):
    return state.student, state.ema, state.players["score"].params


def draw(batch_size=BATCH, step=0, seed=0, **changes):
    method = changed(Toy().method, latent_shape=(2, 2, 1), **changes)
    key = jax.random.key_data(jax.random.key(seed))
    student, followers = jax.jit(lambda key, step: random_numbers(method, key, step, batch_size))(key, step)
    return student.z, student.terms["vsd"], followers["score"]


def test_times_and_null_prompts_have_the_right_distributions():
    z, vsd, score = draw(100_000)
    assert (vsd.t.min(), vsd.t.max()) == (20, 980), "both ends are included"
    assert (score.t.min(), score.t.max()) == (0, 999)
    assert abs(vsd.t.mean() - 500) < 4 and abs(score.t.mean() - 499.5) < 4
    assert abs(score.null.mean() - 0.1) < 0.005
    for noise in (z, vsd.noise, score.noise):
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert not np.any(draw(100, score__null_prompt_probability=0.0)[2].null)


def test_every_random_number_has_a_key_of_its_own():
    z, vsd, score = draw(1000, vsd__t_min=0, vsd__t_max=999)
    samples, scores = zip(
        *(drawn_afresh(0, number, count=2, batch_size=1000) for number in (0, 1)), strict=True
    )
    noises = [z, vsd.noise, score.noise, *samples, *(one.noise for one in scores)]
    correlations = np.corrcoef([noise.ravel() for noise in noises])
    assert np.abs(correlations - np.eye(7)).max() < 0.08
    times = [vsd.t, score.t, *(one.t for one in scores)]
    assert np.abs(np.corrcoef(times) - np.eye(4)).max() < 0.15
    assert np.mean(scores[0].null != scores[1].null) > 0.1 and np.mean(scores[0].null != score.null) > 0.1
    for other in (draw(1000, step=1), draw(1000, seed=1)):
        assert np.mean(other[1].t == vsd.t) < 0.01
        assert np.abs(np.corrcoef(other[0].ravel(), z.ravel())[0, 1]) < 0.08


def test_a_student_of_several_steps_trains_each_of_them_as_often_and_with_noises_of_its_own():
    schedule = toy_world.few_step_schedule((999, 749, 499, 249))
    method = changed(Toy().method, student__schedule=schedule)
    root = jax.random.key_data(jax.random.key(0))

    @jax.jit
    @jax.vmap
    def drawn(step):
        return random_numbers(method, root, step, 3)[0].z

    start = drawn(jnp.arange(800))
    assert np.all(start.taken == start.taken[:, :1]), "one for the whole batch"
    assert np.abs(np.bincount(start.taken[:, 0], minlength=4) / 800 - 0.25).max() < 0.05
    plain, _ = jax.jit(lambda: random_numbers(Toy().method, root, 5, 3))()
    assert_same(plain.z, start.z[5])
    noises = [start.z.ravel(), *(start.again[:, :, number].ravel() for number in range(3))]
    assert np.abs(np.corrcoef(noises) - np.eye(4)).max() < 0.03
    assert abs(start.again.mean()) < 0.01 and abs(start.again.std() - 1) < 0.01


def test_of_one_timestep_the_program_is_that_of_the_one_step_student(toy):
    """The last alone is the student as it was: no loop, no branch, and not a number more."""

    def program(timesteps):
        schedule = dataclasses.replace(toy.method.student.schedule, timesteps=timesteps)
        method = changed(toy.method, student__schedule=schedule)
        return str(jax.make_jaxpr(make_train_step(method))(toy.init(), toy.frozen, toy.batch))

    one = program(())
    assert program((999,)) == one
    assert "cond[" not in one and "scan[" not in one
    assert "cond[" in program((999, 499))


def test_null_prompts_differ_within_a_batch():
    assert 0 < draw(score__null_prompt_probability=0.5)[2].null.sum() < BATCH


@pytest.mark.parametrize(
    "passes", [{"accumulate": 2}, {"accumulate": 4}, {"clip__passes": 2}, {"clip__passes": 4}], ids=str
)
def test_passes_change_nothing_but_rounding(toy, plain_step, passes):
    state, metrics = run(plain_step, toy, toy.init(), 1)
    accumulated, accumulated_metrics = run(toy.train_step(ema=0.9, **passes), toy, toy.init(), 1)
    for trees in zip(*map(trained, (state, accumulated)), strict=True):
        for leaf, want in trees[0].items():
            assert relative_error(trees[1][leaf], want) < 1e-5, leaf
    assert metrics.keys() == accumulated_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(accumulated_metrics[name], value, rtol=1e-5, err_msg=name)


def test_metrics_are_float32_scalars(toy, plain_step):
    _, metrics = run(plain_step, toy, toy.init(), 1)
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    assert {value.shape for value in metrics.values()} == {()}
    assert metrics.keys() == {
        "loss/vsd", "loss/clip", "loss/score", "clip/cosine", "clip/clamped", "latents/std",
        "grad_norm/student", "grad_norm/score", "skipped",
    }  # fmt: skip


def test_two_runs_are_bit_identical_and_two_seeds_are_not(toy, plain_step):
    first, _ = run(plain_step, toy, toy.init())
    second, _ = run(plain_step, toy, toy.init())
    other, _ = run(plain_step, toy, toy.init(seed=1))
    assert_same(first, second)
    assert first.step == 3 and np.any(first.student["out.kernel"] != other.student["out.kernel"])


def test_a_resumed_run_draws_what_it_would_have_drawn(toy, plain_step):
    """All randomness is a function of the root key and the step, both in the state."""
    state, _ = run(plain_step, toy, toy.init(), 2)
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), state)
    assert_same(run(plain_step, toy, restored)[0], run(plain_step, toy, toy.init(), 5)[0])


def test_the_average_follows_the_student_at_its_rate_after_a_ramp(toy, plain_step):
    """Early, and past the step (80) at which the ramp reaches the decay of 0.9."""
    for first, decays in ((0, (1 / 10, 2 / 11)), (79, (80 / 89, 0.9))):
        state = dataclasses.replace(toy.init(), step=jnp.int32(first))
        for decay in decays:
            before = {name: np.float64(leaf) for name, leaf in state.ema.items()}
            state, _ = run(plain_step, toy, state, 1)
            for name, mean in state.ema.items():
                want = decay * before[name] + (1 - decay) * np.float64(state.student[name])
                np.testing.assert_allclose(mean, want, rtol=1e-5, atol=1e-7)
                assert np.any(mean != before[name])


def test_the_ramp_is_that_of_diffusers():
    average = EMAModel([torch.nn.Parameter(torch.ones(1))], decay=0.9999)
    for step in (1, 2, 7, 1_000, 89_988, 89_991, 200_000):  # but for the first, which copies there
        assert abs(ema_decay(0.9999, jnp.int32(step)) - average.get_decay(step + 1)) < 2e-7


def test_no_average_is_kept_without_one_and_a_rate_of_zero_copies(toy):
    step = toy.train_step(ema=0.0)
    none, _ = run(step, toy, toy.init(ema=False))
    assert none.ema == {}
    copied, _ = run(step, toy, toy.init())
    assert_same(copied.ema, copied.student)
    for name, leaf in none.student.items():  # another program, so not to the bit
        np.testing.assert_allclose(leaf, copied.student[name], rtol=1e-5, atol=1e-7)


def test_clip_weight_falls_linearly_to_nothing(toy):
    """With the CLIP loss alone, the student's gradient is proportional to its weight at each step."""
    method = changed(toy.method, vsd__scale=0.0, clip__tau=0.9)
    noise, _ = random_numbers(method, toy.init().key, 0, BATCH)
    conditions = encode(method, toy.frozen, toy.batch)

    @jax.jit
    def gradient(step):
        state = dataclasses.replace(toy.init(), step=step)
        return student_gradient(method, state, toy.frozen, conditions, noise)[0]

    first = gradient(jnp.int32(0))
    for step in (1, 7, 19, 20):
        for name, leaf in gradient(jnp.int32(step)).items():
            np.testing.assert_allclose(leaf, (1 - step / 20) * first[name], rtol=1e-4, atol=1e-7)
    assert max(np.abs(leaf).max() for leaf in first.values()) > 1e-3


def test_a_constant_clip_weight_is_the_same_to_the_end(toy):
    (falling,) = [term for term in toy.method.terms if term.name == "clip"]
    constant = dataclasses.replace(falling, first=0.5, steps=None)
    assert [constant.weight(jnp.int32(step)) for step in (0, 7, 20)] == [0.5] * 3


def test_one_prompt_that_gives_nan_leaves_the_state_and_the_next_batch_goes_on(toy, plain_step):
    text = toy.frozen["text_encoder"]
    poisoned = {"table.embedding": text["table.embedding"].at[toy_world.VOCABULARY - 1].set(np.nan)}
    frozen = toy.frozen | {"text_encoder": poisoned}
    ids = toy.batch["input_ids"].copy()
    ids[3, 1] = toy_world.VOCABULARY - 1
    before, _ = run(plain_step, toy, toy.init(), 1)
    after, metrics = plain_step(before, frozen, toy.batch | {"input_ids": ids})
    assert metrics["skipped"] == 1.0 and not np.isfinite(metrics["loss/vsd"])
    assert after.step == 2
    assert_same(dataclasses.replace(after, step=before.step), before)
    going_on, metrics = plain_step(after, frozen, toy.batch)
    assert metrics["skipped"] == 0.0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(going_on))
    assert np.any(going_on.student["out.kernel"] != after.student["out.kernel"])


@pytest.mark.parametrize("where", ["loss/clip", "loss/score", "grad_norm/student"])
def test_any_one_number_that_is_not_finite_skips_both_updates(toy, where):
    frozen, changes = toy.frozen, {}
    if where == "loss/clip":
        clip = frozen["clip"]
        frozen = frozen | {"clip": clip | {"word": clip["word"] * np.nan}}
    elif where == "loss/score":  # without guidance, only score updates see the null prompt
        frozen = frozen | {"null_text": jax.tree.map(lambda leaf: leaf * np.nan, frozen["null_text"])}
        changes = {"vsd__guidance": 1.0, "vsd__score_guidance": 1.0, "score__null_prompt_probability": 0.5}
    else:  # finite losses, but the gradient's square overflows
        changes = {"vsd__scale": 1e30}
    before = toy.init()
    after, metrics = toy.train_step(**changes)(before, frozen, toy.batch)
    others = metrics.keys() - {where, "skipped", "grad_norm/student", "grad_norm/score", "clip/cosine"}
    assert not np.isfinite(metrics[where]) and all(np.isfinite(metrics[name]) for name in others)
    assert metrics["skipped"] == 1.0
    assert_same(dataclasses.replace(after, step=before.step), before)


def test_bfloat16_networks_keep_float32_masters_and_losses(toy, plain_step):
    half = Toy(jnp.bfloat16, ema=0.9)
    state, metrics = run(half.train_step(), half, half.init(), 1)
    want, metrics_of_full = run(plain_step, toy, toy.init(), 1)
    for name, leaf, full in zip(leaf_names(state), *map(jax.tree.leaves, (state, want)), strict=True):
        assert leaf.dtype == full.dtype, name
    for name, value in metrics.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, metrics_of_full[name], rtol=0.1, atol=0.02, err_msg=name)


def test_a_donated_state_shares_no_buffer_with_itself(toy):
    step = toy.train_step({"donate_argnums": 0})
    state = toy.init()
    for _ in range(2):
        state, _ = step(state, toy.frozen, toy.batch)
    assert state.step == 2


class Gaussian:
    """The exact denoiser of N(mean + d, exp(log_std + s)^2) for each prompt's mean; d and s are its "LoRA"."""

    def __init__(self, schedule):
        self.alpha, self.sigma = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)

    def apply(self, params, latents, t, context, added, lora_scale):
        mean = context[:, 0, 0] + lora_scale * (context[:, 0] @ params["lora.d"])
        std = jnp.exp(-0.5 + lora_scale * params["lora.s"])
        a, s, mean, std = (v.reshape(-1, 1, 1, 1) for v in (self.alpha[t], self.sigma[t], mean, std))
        return s * (latents - a * mean) / ((a * std) ** 2 + s**2)


class Shift:
    """A student with x = shift of the prompt + exp(c) z, said as the v that means this x."""

    def __init__(self, schedule):
        self.alpha, self.sigma = schedule.alpha[-1], schedule.sigma[-1]

    def apply(self, params, latents, t, context, added, lora_scale):
        x = (context[:, 0] @ params["shift"]).reshape(-1, 1, 1, 1) + jnp.exp(params["c"]) * latents
        return (self.alpha * latents - x) / self.sigma


class Prompt:
    """Two prompts: their first number is the mean of the teacher's pictures, and they are independent."""

    def apply(self, params, input_ids):
        return TextOutput(jnp.array([[-1.0, 1.0], [2.0, 1.0]])[input_ids], None)


@pytest.mark.parametrize("weighting", ["sbv2", "dmd"])
def test_a_student_of_gaussians_learns_the_teachers_means_and_deviation(weighting):
    """The whole method on a problem with a known answer: pictures of N(-1, e^-1) and N(2, e^-1)."""
    config = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = make_schedule(config)
    score = Score(
        network=Gaussian(schedule),
        schedule=schedule,
        optimizer=optax.adam(3e-2, b1=0.0),
        base="teacher",
        updates=2,
        null_prompt_probability=0.0,
    )
    student = Student(
        network=Shift(schedule),
        schedule=dataclasses.replace(schedule, prediction_type="v_prediction"),
        optimizer=optax.adam(1e-2, b1=0.0),
    )
    method = Method(
        student=student,
        followers=(score,),
        terms=(VSD(score=score, guidance=1.0, score_guidance=1.0, weighting=weighting),),
        text_encoder=TextEncoder({"text_encoder": Prompt()}),
        latent_shape=(2, 2, 1),
    )
    params = {
        "student": {"shift": jnp.array([0.3, 0.0]), "c": jnp.float32(0.2)},
        "score": {"lora.d": jnp.zeros(2), "lora.s": jnp.zeros(1)},
    }
    state = init_state(0, params, method.optimizers, ema=False)
    frozen = {"teacher": {}, "text_encoder": {}, "null_text": Text(jnp.zeros((1, 2)))}
    ids = jnp.arange(64).reshape(64, 1) % 2
    batch = {"input_ids": ids, FRESH: ids[None]}
    step = make_train_step(method)
    train = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, frozen, batch), state, length=600))
    state, metrics = train(state)
    means = jnp.array([[-1.0, 1.0], [2.0, 1.0]]) @ state.student["shift"]
    np.testing.assert_allclose(means, [-1.0, 2.0], atol=0.15)
    np.testing.assert_allclose(jnp.exp(state.student["c"]), np.exp(-0.5), atol=0.1)
    assert metrics["skipped"].sum() == 0
