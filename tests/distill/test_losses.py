"""The losses against NumPy and PyTorch, their gradients, and what must carry none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from diffusers import DDPMScheduler

from sbv2_jax.diffusion.schedule import ScheduleConfig, add_noise, make_schedule
from sbv2_jax.distill.score import WEIGHTINGS as SCORE_WEIGHTINGS
from sbv2_jax.distill.score import score_loss
from sbv2_jax.distill.terms.clip import clamped_clip_loss, cosine
from sbv2_jax.distill.terms.vsd import WEIGHTINGS, vsd_gradient, vsd_loss

SCHEDULE = make_schedule(ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
T = np.array([20, 333, 700, 980], np.int32)
SHAPE = (4, 3, 5, 2)
BOUND = 1e-5


@pytest.fixture
def arrays(rng):
    """Samples, their noised versions, and the predictions of teacher and score model."""
    x, noise, teacher, score = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(4))
    return x, add_noise(SCHEDULE, x, noise, T), teacher, score


def alpha_sigma() -> tuple[np.ndarray, np.ndarray]:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[T].reshape(-1, 1, 1, 1)
    return np.sqrt(abar), np.sqrt(1 - abar)


def float64(*values) -> list[np.ndarray]:
    return [np.asarray(value, np.float64) for value in values]


def test_sbv2_weighting_is_sigma_squared_times_the_difference(arrays):
    x, x_t, teacher, score = arrays
    got = vsd_gradient(SCHEDULE, "sbv2", x, x_t, T, teacher, score)
    _, sigma = alpha_sigma()
    teacher, score = float64(teacher, score)
    assert got.dtype == jnp.float32
    assert relative_error(got, sigma**2 * (teacher - score)) < BOUND


def test_dmd_weighting_is_the_x0_difference_over_each_samples_own_error(arrays):
    x, x_t, teacher, score = arrays
    got = vsd_gradient(SCHEDULE, "dmd", x, x_t, T, teacher, score)
    alpha, sigma = alpha_sigma()
    x, x_t, teacher, score = float64(x, x_t, teacher, score)
    teacher_x0, score_x0 = (x_t - sigma * teacher) / alpha, (x_t - sigma * score) / alpha
    error = np.abs(x - teacher_x0).mean((1, 2, 3))
    assert error.max() > 2 * error.min(), "a mean over the batch would differ"
    assert got.dtype == jnp.float32
    for row in range(len(T)):  # each sample's rounding against its own size
        want = (score_x0[row] - teacher_x0[row]) / error[row]
        assert relative_error(got[row], want) < BOUND


def test_the_weightings_differ_by_one_factor_for_each_sample(arrays):
    x, x_t, teacher, score = arrays
    sbv2 = vsd_gradient(SCHEDULE, "sbv2", x, x_t, T, teacher, score)
    dmd = vsd_gradient(SCHEDULE, "dmd", x, x_t, T, teacher, score)
    alpha, sigma = alpha_sigma()
    x, x_t, teacher = float64(x, x_t, teacher)
    error = np.abs(x - (x_t - sigma * teacher) / alpha).mean((1, 2, 3), keepdims=True)
    ratio = np.asarray(sbv2, np.float64) / np.asarray(dmd, np.float64)
    # Where the two predictions nearly agree, the x0s cancel: the median of a sample's ratios is meant.
    np.testing.assert_allclose(
        np.median(ratio, axis=(1, 2, 3)), (sigma * alpha * error)[:, 0, 0, 0], rtol=BOUND
    )


def test_an_unknown_weighting_is_an_error(arrays):
    x, x_t, teacher, score = arrays
    with pytest.raises(ValueError, match="weighting='sds'"):
        vsd_gradient(SCHEDULE, "sds", x, x_t, T, teacher, score)


def test_gradient_of_the_vsd_loss_is_the_direction_over_a_samples_size(arrays, rng):
    x = arrays[0]
    direction = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    value = vsd_loss(x, direction)
    assert value.shape == (4,) and value.dtype == jnp.float32
    assert relative_error(value, 0.5 * np.mean(float64(direction)[0] ** 2, (1, 2, 3))) < BOUND
    to_x, to_direction = jax.grad(lambda *a: vsd_loss(*a).sum(), argnums=(0, 1))(x, direction)
    assert relative_error(to_x, float64(direction)[0] / direction[0].size) < BOUND
    np.testing.assert_array_equal(to_direction, 0.0)


def test_nothing_reaches_teacher_and_score_through_the_loss(arrays):
    x, x_t, teacher, score = arrays

    def loss(x, x_t, teacher, score):
        direction = vsd_gradient(SCHEDULE, "dmd", x, x_t, T, teacher, score)
        return vsd_loss(x, direction).sum()

    to_x, *others = jax.grad(loss, argnums=(0, 1, 2, 3))(x, x_t, teacher, score)
    want = vsd_gradient(SCHEDULE, "dmd", x, x_t, T, teacher, score) / x[0].size
    assert relative_error(to_x, want) < BOUND, "the normaliser depends on x, but is a constant to the loss"
    for other in others:
        np.testing.assert_array_equal(other, 0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", SCORE_WEIGHTINGS)
def test_score_loss_and_its_gradient_equal_pytorch(arrays, weighting, prediction):
    """Each sample's value, and the gradient to the network's output, from diffusers' own noise and v."""
    x, _, output, noise = arrays
    schedule = dataclasses.replace(SCHEDULE, prediction_type=prediction)
    x_t = add_noise(schedule, x, noise, T)
    value = score_loss(schedule, weighting, output, x, x_t, noise, T)
    assert value.shape == (4,) and value.dtype == jnp.float32
    gradient = jax.grad(lambda o: score_loss(schedule, weighting, o, x, x_t, noise, T).mean())(output)

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    x, output, noise = (torch.tensor(np.asarray(a), dtype=torch.float64) for a in (x, output, noise))
    t = torch.tensor(T).long()
    alpha, sigma = (torch.tensor(values) for values in alpha_sigma())
    noised, velocity = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
    output.requires_grad_()
    if prediction == "epsilon":
        epsilon, v = output, (output - sigma * noised) / alpha
    else:
        epsilon, v = alpha * output + sigma * noised, output
    published = alpha.flatten() ** 2 * F.mse_loss(epsilon, noise, reduction="none").mean((1, 2, 3))
    wanted = {"epsilon": published, "v": F.mse_loss(v, velocity, reduction="none").mean((1, 2, 3))}
    own = (epsilon, noise) if prediction == "epsilon" else (v, velocity)
    wanted["native"] = F.mse_loss(*own, reduction="none").mean((1, 2, 3))
    wanted[weighting].mean().backward()
    for ours, theirs in zip(value, wanted[weighting].detach(), strict=True):
        assert relative_error(ours, theirs) < 5e-5  # alphas_cumprod of diffusers are float32
    for ours, theirs in zip(gradient, output.grad, strict=True):
        assert relative_error(ours, theirs) < 5e-5


def test_the_published_weight_is_a_to_the_fourth_of_an_error_in_v(arrays):
    x, _, output, noise = arrays
    schedule = dataclasses.replace(SCHEDULE, prediction_type="v_prediction")
    given = (output, x, add_noise(schedule, x, noise, T), noise, T)
    ratio = score_loss(schedule, "epsilon", *given) / score_loss(schedule, "v", *given)
    np.testing.assert_allclose(ratio, alpha_sigma()[0].flatten() ** 4, rtol=1e-4)
    assert ratio[-1] < 1e-4 < 0.9 < ratio[0]


@pytest.mark.parametrize("weighting", ["v", "native"])
def test_at_zero_terminal_snr_a_v_network_learns_from_pure_noise(rng, weighting):
    """a_T = 0: the published weighting gives nothing there, and nothing is divided by it."""
    config = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule, t = make_schedule(config), np.array([999], np.int32)
    output, x, noise = (jnp.asarray(rng.standard_normal((1, *SHAPE[1:])), jnp.float32) for _ in range(3))
    value = score_loss(schedule, weighting, output, x, noise, noise, t)
    assert relative_error(value, np.mean((np.float64(output) + x) ** 2, (1, 2, 3))) < BOUND
    assert score_loss(schedule, "epsilon", output, x, noise, noise, t) == 0


def test_an_unknown_weighting_of_the_score_is_an_error(arrays):
    x, x_t, output, noise = arrays
    with pytest.raises(ValueError, match="weighting='x0' is none of"):
        score_loss(SCHEDULE, "x0", output, x, x_t, noise, T)


def test_clip_loss_is_clamped_for_each_sample_not_for_the_batch(rng):
    image, text = (rng.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    image[:2] = 3 * text[:2] + 0.1 * image[:2]  # far above tau
    theirs = torch.tensor(image, dtype=torch.float64, requires_grad=True)
    cosines = F.cosine_similarity(theirs, torch.tensor(text, dtype=torch.float64))
    tau = 0.35
    assert (cosines > tau).sum() >= 2 and (cosines < tau).sum() >= 2
    want = torch.relu(tau - cosines)
    want.mean().backward()

    value = clamped_clip_loss(jnp.asarray(image), jnp.asarray(text), tau)
    gradient = jax.grad(lambda a: clamped_clip_loss(a, jnp.asarray(text), tau).mean())(jnp.asarray(image))
    assert value.shape == (6,) and value.dtype == jnp.float32
    np.testing.assert_array_equal(value[:2], 0.0)
    np.testing.assert_array_equal(gradient[:2], 0.0)
    assert relative_error(value, want.detach()) < BOUND
    assert relative_error(gradient, theirs.grad) < BOUND
    of_the_mean = max(0.0, tau - cosines.mean().item())
    assert abs(value.mean() - of_the_mean) > 0.05


def test_cosine_does_not_depend_on_length(rng):
    a, b = (jnp.asarray(rng.standard_normal((3, 7)), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(cosine(5 * a, b / 9), cosine(a, b), rtol=1e-5)
    np.testing.assert_allclose(cosine(a, -2 * a), -1.0, rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("which", range(4))
def test_bfloat16_is_refused_wherever_it_comes_from(arrays, weighting, which):
    mixed = [a.astype(jnp.bfloat16) if i == which else a for i, a in enumerate(arrays)]
    x, x_t, teacher, score = mixed
    with pytest.raises(TypeError, match="float32"):
        vsd_gradient(SCHEDULE, weighting, x, x_t, T, teacher, score)
    if which < 2:
        with pytest.raises(TypeError, match="float32"):
            score_loss(SCHEDULE, "epsilon", teacher, x, x_t, score, T)
