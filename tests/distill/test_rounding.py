"""Half precision at the last timestep of Stable Diffusion's schedule, where an error is divided by a_T = 0.068."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
from conftest import measured

from sbv2_jax.diffusion.samplers import sample
from sbv2_jax.diffusion.schedule import ScheduleConfig, make_schedule
from sbv2_jax.distill.student import rollout
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import cast

CONFIG = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE = make_schedule(CONFIG)
TEXT = Text(jnp.zeros((2, 3, 4)))


class Ideal:
    """The network that knows the picture: the epsilon, in float32, that leads from what it is given to it."""

    def __init__(self, picture: jax.Array):
        self.picture = picture

    def apply(self, params, latents, t, context, added=None, lora_scale=1.0):
        a, s = (jnp.asarray(v)[t].reshape(-1, 1, 1, 1) for v in (SCHEDULE.alpha, SCHEDULE.sigma))
        return (latents.astype(jnp.float32) - a * self.picture) / s


def rms(x: jax.Array) -> float:
    return measured(float(jnp.sqrt(jnp.mean(jnp.square(x)))))


@pytest.fixture
def pictures(rng):
    return (jnp.asarray(rng.standard_normal((2, 8, 8, 4), np.float32)) for _ in range(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_ideal_student_is_not_blurred_by_rounding(pictures, dtype):
    """0.035 before, of white noise in unit latents."""
    picture, z = pictures
    make = jax.jit(lambda z: rollout(Ideal(picture), SCHEDULE, {}, z, TEXT, dtype=dtype))
    assert rms(make(z) - picture) < 1e-4


def test_neither_is_an_ideal_teacher_in_many_steps(pictures):
    picture, z = pictures

    def denoise(x, t):
        return Ideal(picture).apply({}, x.astype(jnp.bfloat16), t, TEXT.context)

    draw = jax.jit(
        lambda z: sample(denoise, SCHEDULE, z, steps=1, timestep_spacing="trailing", dtype=jnp.bfloat16)
    )
    assert rms(draw(z) - picture) < 1e-4


def test_the_unet_of_half_precision_ends_in_float32():
    world = tiny_world.make_world()
    network = world.run.method.student.network
    half = cast(world.student, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, *tiny_world.LATENTS), jnp.bfloat16)
    context = jax.random.normal(jax.random.key(1), (2, tiny_world.LENGTH, 12), jnp.bfloat16)
    out = jax.jit(network.apply)(half, x, jnp.array([999, 5]), context)
    assert out.dtype == jnp.float32
    assert np.mean(out != out.astype(jnp.bfloat16).astype(jnp.float32)) > 0.9, (
        "not a rounded one that was cast"
    )
