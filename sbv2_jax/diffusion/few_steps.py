"""The timesteps of a student of few steps: checked, and as the LCMScheduler of diffusers chooses them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbv2_jax.errors import InputError

# What an LCMScheduler divides the schedule into where its file does not say it.
ORIGINAL_STEPS = 50


def check_timesteps(timesteps: Sequence[Any], num_timesteps: int, name: str) -> None:
    """Raises InputError, with `name`, unless timesteps are whole numbers that fall and lie within the schedule.

    Not even the last one may be 0, at which there is next to nothing to predict and nothing in an LCMScheduler.
    """
    whole = all(isinstance(t, int) and not isinstance(t, bool) for t in timesteps)
    if not whole or list(timesteps) != sorted(set(timesteps), reverse=True):
        raise InputError(f"{name} = {timesteps!r}: whole numbers that fall are expected, such as (999, 499)")
    if timesteps and not 1 <= timesteps[-1] <= timesteps[0] < num_timesteps:
        raise InputError(f"{name} = {timesteps!r}: timesteps from 1 to {num_timesteps - 1} are expected")


def lcm_timesteps(num_timesteps: int, steps: int, original_steps: int) -> tuple[int, ...]:
    """Returns the timesteps that diffusers' LCMScheduler visits in `steps` steps, falling.

    Of `original_steps` multiples of T // original_steps, less 1, about evenly spaced ones from the last down
    (Luo et al., 2023, Latent Consistency Models). Raises InputError where there are fewer than `steps`.
    """
    if original_steps > num_timesteps:
        raise InputError(
            f"original_inference_steps={original_steps}: the schedule has {num_timesteps} timesteps"
        )
    if not 1 <= steps <= original_steps:
        raise InputError(f"steps={steps}: this LCMScheduler gives 1 to {original_steps}")
    multiples = np.arange(original_steps, 0, -1) * (num_timesteps // original_steps) - 1
    chosen = np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(int)
    return tuple(multiples[chosen].tolist())


def original_steps_of(timesteps: Sequence[int], num_timesteps: int) -> int | None:
    """Returns the `original_inference_steps` with which an LCMScheduler visits these timesteps, or None.

    The smallest one: for those that divide the schedule evenly, such as (999, 749, 499, 249), their number.
    """
    steps = len(timesteps)
    for original in range(steps, num_timesteps + 1):
        if lcm_timesteps(num_timesteps, steps, original) == tuple(timesteps):
            return original
    return None
