"""The timesteps and the sampler of a student of few steps, against diffusers' LCMScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import LCMScheduler
from diffusers.schedulers import scheduling_lcm

from sbv2_jax.diffusion.few_steps import check_timesteps, lcm_timesteps, original_steps_of
from sbv2_jax.diffusion.samplers import few_steps, few_timesteps, settled
from sbv2_jax.diffusion.schedule import ScheduleConfig, make_schedule
from sbv2_jax.errors import InputError


@pytest.mark.parametrize("original", [1, 2, 3, 4, 7, 50, 60, 100, 999, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_timesteps_are_those_of_diffusers(original, steps):
    scheduler = LCMScheduler(original_inference_steps=original)
    try:
        scheduler.set_timesteps(steps)
    except ValueError:
        with pytest.raises(InputError, match=f"steps={steps}: this LCMScheduler gives 1 to {original}"):
            lcm_timesteps(1000, steps, original)
        return
    assert lcm_timesteps(1000, steps, original) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("timesteps", "original"),
    [
        ((999, 499), 2),
        ((999, 749, 499, 249), 4),
        ((999, 759, 499, 259), 50),
        ((999, 599), 5),
        ((999, 299), None),
        ((399,), None),
    ],
)
def test_timesteps_that_a_number_of_steps_gives_are_found(timesteps, original):
    found = original_steps_of(timesteps, 1000)
    assert (found is None) == (original is None)
    if found is not None:
        scheduler = LCMScheduler(original_inference_steps=found)
        scheduler.set_timesteps(len(timesteps))
        assert tuple(scheduler.timesteps.tolist()) == timesteps and found <= original


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_equals_diffusers_with_the_same_noises(rng, monkeypatch, prediction_type, steps):
    """The noises of the later steps are handed to diffusers in place of those that it would draw."""
    theirs = LCMScheduler(prediction_type=prediction_type, original_inference_steps=4, timestep_scaling=1e4)
    theirs.set_timesteps(steps)
    schedule = make_schedule(ScheduleConfig.from_dict(dict(theirs.config) | {"_class_name": "LCMScheduler"}))
    noise = rng.standard_normal((2, 4, 4, 3), np.float32)
    again = rng.standard_normal((2, steps - 1, 4, 4, 3), np.float32)
    weights = rng.standard_normal((3, 3), np.float32)
    later = iter(torch.from_numpy(again[:, number]) for number in range(steps - 1))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(later))
    x = torch.from_numpy(noise)
    for t in theirs.timesteps:
        output = torch.tanh(x @ torch.from_numpy(weights) + t / 1000)
        x = theirs.step(output, t, x).prev_sample
    got = jax.jit(
        lambda noise, again: few_steps(
            lambda x, t: jnp.tanh(x @ weights + (t / 1000).reshape(-1, 1, 1, 1)),
            schedule,
            noise,
            again,
            few_timesteps(schedule, steps),
        )
    )(noise, again)
    assert relative_error(got, x.numpy()) < 2e-4


def test_noise_for_another_number_of_steps_is_refused(rng):
    schedule, noise = make_schedule(ScheduleConfig()), rng.standard_normal((2, 4, 4, 3), np.float32)
    for again in (None, noise[:, None]):
        with pytest.raises(
            InputError, match=r"of 3 steps takes the noise of its further ones, \[B, 2, ...\]"
        ):
            few_steps(lambda x, t: x, schedule, noise, again, (999, 499, 99))


def test_what_a_call_leaves_open_is_what_the_file_says():
    def of(**values):
        return make_schedule(ScheduleConfig.from_dict(values))

    student = of(_class_name="LCMScheduler", original_inference_steps=50, _timesteps=[999, 299])
    assert settled(student, None, None) == (2, "lcm") and few_timesteps(student, 2) == (999, 299)
    assert settled(student, 4, None) == (4, "lcm") and few_timesteps(student, 4) == (999, 759, 499, 259)
    assert settled(student, None, "ddim") == (2, "ddim")
    published = of(_class_name="LCMScheduler")
    assert settled(published, None, None) == (1, "lcm") and few_timesteps(published, 1) == (999,)
    # What a scheduler made of an LCMScheduler's settings has of them is none of its own.
    euler = of(_class_name="EulerDiscreteScheduler", original_inference_steps=50, _timesteps=[999, 299])
    assert settled(euler, None, None) == (1, "dpm") and settled(euler, 4, "lcm") == (4, "lcm")
    assert few_timesteps(euler, 4) == (999, 759, 499, 259)


@pytest.mark.parametrize(
    "timesteps",
    [(499, 999), (999, 999), (999.5, 3), ("999",), (True,), (1000, 3), (999, 0), (999, -1)],
    ids=str,
)
def test_timesteps_that_do_not_fall_or_lie_outside_are_one_line(timesteps):
    with pytest.raises(InputError, match=r"^it = \(.*expected") as caught:
        check_timesteps(timesteps, 1000, "it")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="_timesteps = .*expected"):
        ScheduleConfig.from_dict({"_class_name": "LCMScheduler", "_timesteps": list(timesteps)})


@pytest.mark.parametrize(
    "values", [{"clip_sample": True}, {"thresholding": True}, {"original_inference_steps": 0}], ids=str
)
def test_an_lcm_scheduler_that_would_draw_otherwise_is_refused(values):
    with pytest.raises(InputError, match=f"{next(iter(values))}="):
        ScheduleConfig.from_dict({"_class_name": "LCMScheduler", **values})
