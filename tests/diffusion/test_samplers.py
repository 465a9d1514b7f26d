"""The samplers against diffusers, with a random nonlinear network that is the same function on both sides."""

import dataclasses
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from published_schedules import SD_15, SD_21, SD_TURBO

from sbv2_jax.diffusion.samplers import ddim_timesteps, dpm_timesteps, guided, sample
from sbv2_jax.diffusion.schedule import ScheduleConfig, make_schedule, to_x0
from sbv2_jax.errors import InputError

SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 6, 5, 4)


class Denoiser:
    """tanh(tanh(x A + c(t)) B) + 0.3 x with random weights, in jax.numpy [B, h, w, 4] or in torch."""

    def __init__(self, rng):
        self.first = rng.standard_normal((4, 16)).astype(np.float32) / 2
        self.second = rng.standard_normal((16, 4)).astype(np.float32) / 4
        self.frequency = rng.uniform(0.001, 0.02, 16).astype(np.float32)

    def jax(self, x, t):
        phase = jnp.sin(t.astype(jnp.float32)[:, None] * self.frequency[None, :])[:, None, None, :]
        return jnp.tanh(jnp.tanh(x @ self.first + phase) @ self.second) + 0.3 * x

    def torch(self, x, t):
        first, second, frequency = map(torch.tensor, (self.first, self.second, self.frequency))
        phase = torch.sin(float(t) * frequency)
        return torch.tanh(torch.tanh(x @ first + phase) @ second) + 0.3 * x


def their_sampler(name, file, **values):
    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(file, clip_sample=False, **values)
    return diffusers.DPMSolverMultistepScheduler.from_config(
        file,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        **values,
    )


def their_sample(scheduler, denoiser, noise, steps):
    scheduler.set_timesteps(steps)
    x = torch.tensor(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.torch(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("steps", [3, 4, 25, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("file", [SD_15, SD_21], ids=["epsilon", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_equals_diffusers(sampler, file, spacing, steps, rng):
    denoiser = Denoiser(rng)
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    theirs = their_sample(their_sampler(sampler, file, timestep_spacing=spacing), denoiser, noise, steps)
    schedule = make_schedule(ScheduleConfig.from_dict(file))
    ours = sample(
        denoiser.jax, schedule, jnp.asarray(noise), steps=steps, sampler=sampler, timestep_spacing=spacing
    )
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize(
    "values",
    [
        SD_TURBO,
        {"_class_name": "DDIMScheduler"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        {**SD_21, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"_class_name": "LCMScheduler", "set_alpha_to_one": True, "steps_offset": 2},
    ],
    ids=["turbo", "defaults", "cosine", "zero_snr", "offset"],
)
def test_settings_come_from_the_file(sampler, values, rng):
    """Spacing, offset and last alpha as `from_config` of the same file sets them, in one jitted function."""
    denoiser = Denoiser(rng)
    noise = rng.standard_normal(SHAPE).astype(np.float32)
    schedule = make_schedule(ScheduleConfig.from_dict(values))
    # The default of LCMScheduler for its betas is Stable Diffusion's; DDIMScheduler's is not.
    betas = ScheduleConfig.CLASS_DEFAULTS.get(values["_class_name"], {})
    theirs = their_sample(their_sampler(sampler, {**betas, **values}), denoiser, noise, 10)
    ours = jax.jit(lambda s, x: sample(denoiser.jax, s, x, steps=10, sampler=sampler))(schedule, noise)
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_timesteps_equal_diffusers_exactly(name, spacing):
    ours = {"ddim": ddim_timesteps, "dpm": dpm_timesteps}[name]
    compared = 0
    for count, offset in itertools.product((1000, 100, 77), (0, 1)):
        values = {"num_train_timesteps": count, "steps_offset": offset, "timestep_spacing": spacing}
        theirs = their_sampler(name, {}, **values)
        for steps in [*range(1, 64), 76, 77, 99, 100, 128, 250, 333, 500, 999, 1000]:
            if steps > count:
                continue
            theirs.set_timesteps(steps)
            expected = theirs.timesteps.tolist()
            if len(expected) == steps + 1:
                # Rounding gave diffusers one step too many, at a timestep that does not exist.
                assert spacing == "trailing" and expected.pop() == -1
            if max(expected) >= count or len(set(expected)) < steps:
                with pytest.raises(InputError):
                    ours(count, steps, spacing, offset)
                continue
            table = ours(count, steps, spacing, offset)
            assert table.dtype == np.int32 and table.tolist() == expected
            compared += 1
    assert compared > 300


def test_timesteps_that_do_not_exist_are_refused():
    for ours, count, steps, spacing, offset in (
        (ddim_timesteps, 1000, 1000, "leading", 1),  # the first would be 1000
        (ddim_timesteps, 1000, 1001, "trailing", 0),
        (dpm_timesteps, 1000, 1000, "leading", 0),  # a stride of 0
        (dpm_timesteps, 1000, 0, "linspace", 0),
        (ddim_timesteps, 1000, 10, "even", 0),
    ):
        with pytest.raises(InputError, match="steps|timestep_spacing"):
            ours(count, steps, spacing, offset)
    with pytest.raises(InputError, match="ddim, dpm"):
        sample(None, make_schedule(ScheduleConfig()), jnp.zeros(SHAPE), steps=4, sampler="euler")


@pytest.mark.parametrize("file", [SD_15, SD_21, {**SD_21, "rescale_betas_zero_snr": True}])
def test_one_trailing_step_is_the_prediction_of_x0(file, rng):
    denoiser = Denoiser(rng)
    noise = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    schedule = make_schedule(ScheduleConfig.from_dict(file))
    last = jnp.full((SHAPE[0],), 999, jnp.int32)
    expected = jax.jit(lambda z: to_x0(schedule, denoiser.jax(z, last), z, last))(noise)
    one = {"steps": 1, "timestep_spacing": "trailing"}
    # DDIM ends at alpha 1 only where the file says so.
    ends_at_one = dataclasses.replace(schedule, set_alpha_to_one=True)
    ddim = sample(denoiser.jax, ends_at_one, noise, sampler="ddim", **one)
    assert relative_error(ddim, expected) < 1e-6
    if schedule.alpha[-1] > 0:
        assert relative_error(sample(denoiser.jax, schedule, noise, sampler="dpm", **one), expected) < 1e-6


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_the_perfect_denoiser_of_one_point_returns_it(sampler, rng):
    """Where all data are one point, x0 is known at every t: the sampler must end there, from any noise."""
    schedule = make_schedule(ScheduleConfig(set_alpha_to_one=True))
    point = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)

    def denoise(x, t):
        a, s = (jnp.asarray(c)[t].reshape(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
        return (x - a * point) / s

    noise = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    assert relative_error(sample(denoise, schedule, noise, steps=20, sampler=sampler), point) < 1e-4


def test_guidance_calls_the_network_once_on_both_halves(rng):
    denoiser = Denoiser(rng)
    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    t = jnp.array([10, 900], jnp.int32)
    conditional, unconditional = (jnp.asarray(rng.standard_normal((2, 4)), jnp.float32) for _ in range(2))
    calls = []

    def apply(x, t, context):
        calls.append(x.shape)
        return denoiser.jax(x + context["text"][:, None, None, :], t)

    both = [{"text": conditional}, {"text": unconditional}]
    with_, without = (apply(x, t, context) for context in both)
    calls.clear()
    out = guided(apply, *both, 7.5)(x, t)
    assert calls == [(4, *SHAPE[1:])]
    assert relative_error(out, without + 7.5 * (with_ - without)) < 1e-6
    calls.clear()
    assert relative_error(guided(apply, *both, 1.0)(x, t), with_) < 1e-6
    assert calls == [SHAPE]


def test_one_copy_of_the_network_whatever_the_steps(rng):
    denoiser = Denoiser(rng)
    schedule = make_schedule(ScheduleConfig.from_dict(SD_15))
    for steps in (4, 50):
        traced = jax.make_jaxpr(lambda x, n=steps: sample(denoiser.jax, schedule, x, steps=n))(
            jnp.zeros(SHAPE)
        )
        assert str(traced).count("tanh") == 2


def test_bfloat16_is_refused_not_promoted(rng):
    schedule = make_schedule(ScheduleConfig.from_dict(SD_15))
    noise = jnp.zeros(SHAPE)
    with pytest.raises(TypeError, match="bfloat16"):
        sample(lambda x, t: x.astype(jnp.bfloat16), schedule, noise, steps=2)
    with pytest.raises(TypeError, match="bfloat16"):
        sample(lambda x, t: x, schedule, noise.astype(jnp.bfloat16), steps=2)
