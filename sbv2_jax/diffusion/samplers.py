"""Samplers, each as one scan over one network call.

For a multi-step teacher DDIM (eta 0) and DPM-Solver++ (2M); both advance x by the same linear rule,

    x_next = keep x + data x0 + previous x0_of_the_step_before,

and differ in the timesteps they visit and in the three coefficients of each step. For a student of few steps that of
latent consistency models ("lcm"): at each timestep the network predicts x0, which is noised anew to the next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.diffusion.few_steps import ORIGINAL_STEPS, lcm_timesteps
from sbv2_jax.diffusion.schedule import (
    TIMESTEP_SPACINGS,
    Schedule,
    classifier_free_guidance,
    is_guided,
    rounded,
    to_x0,
)
from sbv2_jax.errors import InputError

_OF_TEACHERS = ("ddim", "dpm")
SAMPLERS = (*_OF_TEACHERS, "lcm")

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def sample(
    denoise: Denoise,
    schedule: Schedule,
    noise: jax.Array,
    *,
    steps: int,
    sampler: str = "ddim",
    timestep_spacing: str | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Integrates the probability flow from noise to x0, calling the network `steps` times.

    `denoise(x_t [B, ...], t int32 [B])` returns the network's output, float32, by `schedule.prediction_type`.
    noise float32 [B, ...] is x at the first timestep; returns float32 [B, ...]. `sampler` is "ddim" (Song et
    al., 2021, equation 12) or "dpm" (DPM-Solver++, Lu et al., 2022, algorithm 2). `timestep_spacing` None
    is the schedule's own or, where that is None too, what diffusers defaults to: "leading" for DDIM,
    "linspace" for DPM-Solver++.
    `dtype` is that of the network's arithmetic.
    Pure: `steps`, `sampler`, `timestep_spacing` and `dtype` are static, the rest may be traced.
    Raises InputError for steps that the schedule cannot give, TypeError for arrays that are not float32.
    """
    if sampler not in _OF_TEACHERS:
        raise InputError(f"sampler={sampler!r} is not one of {', '.join(_OF_TEACHERS)}")
    spacing = timestep_spacing or schedule.timestep_spacing
    if sampler == "ddim":
        timesteps = ddim_timesteps(schedule.num_timesteps, steps, spacing or "leading", schedule.steps_offset)
        table = _ddim_table(schedule, timesteps)
    else:
        schedule = _without_zero_signal(schedule)
        timesteps = dpm_timesteps(schedule.num_timesteps, steps, spacing or "linspace", schedule.steps_offset)
        table = _dpm_table(schedule, timesteps)

    def step(
        carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, x0_before = carry
        timestep, keep, data, previous = row
        x0 = x0_at(denoise, schedule, x, jnp.full(x.shape[:1], timestep, jnp.int32), dtype)
        return (keep * x + data * x0 + previous * x0_before, x0), None

    (x, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), (jnp.asarray(timesteps), *table))
    return x


def x0_at(
    denoise: Denoise, schedule: Schedule, x: jax.Array, t: jax.Array, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Returns the x0 that the network predicts from x at the timesteps t, int32 [B]; float32 [B, ...].

    `denoise`, x and `dtype` are as for `sample`.
    """
    seen = rounded(x, dtype)
    return to_x0(schedule, denoise(seen, t), seen, t)


def few_steps(
    denoise: Denoise,
    schedule: Schedule,
    noise: jax.Array,
    again: jax.Array | None,
    timesteps: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Returns the x0 that a student of few steps draws from noise, float32 [B, ...].

    At each of the timesteps, which fall, the network predicts x0, which is noised to the next one with noise of its
    own, `again` float32 [B, len(timesteps) - 1, ...]; of one timestep it is that x0, and `again` is not read.
    `denoise`, noise and `dtype` are as for `sample`. Source: DMD2 (Yin et al., 2024), section 4.5; multistep
    consistency sampling (Song et al., 2023, algorithm 1; Luo et al., 2023). Raises InputError for another `again`.
    """
    if len(timesteps) == 1:
        return x0_at(denoise, schedule, noise, jnp.full(noise.shape[:1], timesteps[0], jnp.int32), dtype)
    if again is None or again.shape[:2] != (noise.shape[0], len(timesteps) - 1):
        raise InputError(
            f"a student of {len(timesteps)} steps takes the noise of its further ones, [B, {len(timesteps) - 1}, ...]"
        )
    following = list(timesteps[1:])
    # After the last one x0 stays as it is.
    alpha = jnp.append(jnp.asarray(schedule.alpha)[jnp.asarray(following)], 1.0)
    sigma = jnp.append(jnp.asarray(schedule.sigma)[jnp.asarray(following)], 0.0)
    later = jnp.concatenate([jnp.moveaxis(again, 1, 0), jnp.zeros_like(noise)[None]])

    def step(x: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        timestep, a, s, own = row
        x0 = x0_at(denoise, schedule, x, jnp.full(x.shape[:1], timestep, jnp.int32), dtype)
        return a * x0 + s * own, None

    return jax.lax.scan(step, noise, (jnp.array(timesteps, jnp.int32), alpha, sigma, later))[0]


def settled(schedule: Schedule, steps: int | None, sampler: str | None) -> tuple[int, str]:
    """Returns the number of steps and the sampler of a call that leaves them open.

    They are those of a student whose timesteps the schedule says; else 1 and, unless it is that of an LCMScheduler,
    "dpm".
    """
    few = schedule.timesteps or schedule.original_inference_steps is not None
    return steps or len(schedule.timesteps) or 1, sampler or ("lcm" if few else "dpm")


def few_timesteps(schedule: Schedule, steps: int) -> tuple[int, ...]:
    """Returns the timesteps of "lcm" in `steps` steps: the student's own, if it has so many, or an LCMScheduler's.

    Raises InputError for more steps than that one has.
    """
    if steps == len(schedule.timesteps):
        return schedule.timesteps
    return lcm_timesteps(schedule.num_timesteps, steps, schedule.original_inference_steps or ORIGINAL_STEPS)


def interleaved(*trees: Any) -> Any:
    """Returns n pytrees of arrays [B, ...] as one of [n B, ...], the n rows of each sample side by side.

    To put one batch behind the other would move rows between the devices that a batch is split over.
    """
    return jax.tree.map(lambda *rows: jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:]), *trees)


def separated(rows: jax.Array, count: int) -> list[jax.Array]:
    """Returns the `count` arrays [B, ...] that `interleaved` made one of."""
    parts = rows.reshape(-1, count, *rows.shape[1:])
    return [parts[:, i] for i in range(count)]


def guided(
    apply: Callable[[jax.Array, jax.Array, Any], jax.Array],
    conditional: Any,
    unconditional: Any,
    scale: float | jax.Array,
) -> Denoise:
    """Returns a `denoise` with classifier-free guidance that calls the network once, on a batch of 2 B.

    `apply(x_t, t, context)` is the network; conditional and unconditional are pytrees of arrays [B, ...]. The two
    rows of a sample stand side by side (`interleaved`). A scale of 1 or less is none (`schedule.is_guided`): the
    conditional network alone, at half the cost.
    """
    if not is_guided(scale):
        return lambda x, t: apply(x, t, conditional)

    context = interleaved(unconditional, conditional)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        without, with_ = separated(apply(interleaved(x, x), interleaved(t, t), context), 2)
        return classifier_free_guidance(with_, without, scale)

    return denoise


def ddim_timesteps(
    num_train_timesteps: int, steps: int, timestep_spacing: str = "leading", steps_offset: int = 0
) -> np.ndarray:
    """Returns the timesteps DDIM visits, int32 [steps], falling, as in diffusers' DDIMScheduler.

    Raises InputError where there are no such distinct timesteps within 0..num_train_timesteps-1.
    """
    _require_steps(num_train_timesteps, steps, timestep_spacing)
    if timestep_spacing == "trailing":
        timesteps = _trailing(num_train_timesteps, steps)
    elif timestep_spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (num_train_timesteps // steps) + steps_offset
    else:
        timesteps = np.linspace(0, num_train_timesteps - 1, steps).round()[::-1]
    return _checked(timesteps, num_train_timesteps, timestep_spacing)


def dpm_timesteps(
    num_train_timesteps: int, steps: int, timestep_spacing: str = "linspace", steps_offset: int = 0
) -> np.ndarray:
    """Returns the timesteps DPM-Solver++ visits, int32 [steps], falling, as in DPMSolverMultistepScheduler.

    "leading" and "linspace" divide the range by one step more than DDIM, since the last step ends at x0.
    Raises InputError where there are no such distinct timesteps within 0..num_train_timesteps-1.
    """
    _require_steps(num_train_timesteps, steps, timestep_spacing)
    if timestep_spacing == "trailing":
        timesteps = _trailing(num_train_timesteps, steps)
    elif timestep_spacing == "leading":
        timesteps = np.arange(1, steps + 1)[::-1] * (num_train_timesteps // (steps + 1)) + steps_offset
    else:
        timesteps = np.linspace(0, num_train_timesteps - 1, steps + 1).round()[:0:-1]
    return _checked(timesteps, num_train_timesteps, timestep_spacing)


def _trailing(num_train_timesteps: int, steps: int) -> np.ndarray:
    # For some counts (61 of 1000) rounding gives arange one element too many, the timestep -1.
    return np.arange(num_train_timesteps, 0, -num_train_timesteps / steps).round()[:steps] - 1


def _require_steps(num_train_timesteps: int, steps: int, timestep_spacing: str) -> None:
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise InputError(
            f"timestep_spacing={timestep_spacing!r} is not one of {', '.join(TIMESTEP_SPACINGS)}"
        )
    if not 1 <= steps <= num_train_timesteps:
        raise InputError(f"steps={steps}: expected 1 to {num_train_timesteps}")


def _checked(timesteps: np.ndarray, num_train_timesteps: int, timestep_spacing: str) -> np.ndarray:
    timesteps = timesteps.astype(np.int32)
    inside = timesteps[0] < num_train_timesteps and timesteps[-1] >= 0
    if not inside or (np.diff(timesteps) >= 0).any():
        raise InputError(
            f"steps={len(timesteps)}: {timestep_spacing!r} spacing gives no such number of distinct "
            f"timesteps within 0..{num_train_timesteps - 1}"
        )
    return timesteps


Table = tuple[jax.Array, jax.Array, jax.Array]


def _ddim_table(schedule: Schedule, timesteps: np.ndarray) -> Table:
    """keep, data, previous, float32 [steps] each, of DDIM with eta 0 (Song et al., 2021, equation 12)."""
    alpha, sigma = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)
    # Each step ends T // steps below where it began, as in diffusers. With "linspace", and with "trailing"
    # when steps does not divide T, that is not quite where the next one begins.
    following = timesteps - schedule.num_timesteps // len(timesteps)
    end = (1.0, 0.0) if schedule.set_alpha_to_one else (alpha[0], sigma[0])
    done = jnp.asarray(following < 0)
    alpha_next = jnp.where(done, end[0], alpha[np.maximum(following, 0)])
    sigma_next = jnp.where(done, end[1], sigma[np.maximum(following, 0)])
    keep, data = _first_order(alpha[timesteps], sigma[timesteps], alpha_next, sigma_next)
    return keep, data, jnp.zeros_like(keep)


def _dpm_table(schedule: Schedule, timesteps: np.ndarray) -> Table:
    """keep, data, previous, float32 [steps] each, of DPM-Solver++ (2M) (Lu et al., 2022, algorithm 2).

    The first step has no predecessor, and the last goes to sigma 0, where log(alpha / sigma) is infinite:
    both are of first order.
    """
    alpha = jnp.append(jnp.asarray(schedule.alpha)[timesteps], 1.0)
    sigma = jnp.append(jnp.asarray(schedule.sigma)[timesteps], 0.0)
    keep, data = _first_order(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    # lambda is half the logarithm of the signal-to-noise ratio; h its growth over a step.
    h = jnp.diff(jnp.log(alpha[:-1]) - jnp.log(sigma[:-1]))
    ratio = h[1:] / h[:-1]
    correction = data * jnp.pad(0.5 * ratio, (1, 1)) if len(timesteps) > 2 else jnp.zeros_like(data)
    return keep, data + correction, -correction


def _first_order(
    alpha: jax.Array, sigma: jax.Array, alpha_next: jax.Array, sigma_next: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The factors of x and x0 in a' x0 + s' epsilon with epsilon = (x - a x0) / s.

    DDIM's step, and DPM-Solver++'s of first order (Lu et al., 2022).
    """
    keep = sigma_next / sigma
    return keep, alpha_next - alpha * keep


def _without_zero_signal(schedule: Schedule) -> Schedule:
    # With zero terminal signal the first lambda would be minus infinity; diffusers puts abar = 2^-24 there.
    none = jnp.asarray(schedule.alpha) == 0
    return dataclasses.replace(
        schedule,
        alpha=jnp.where(none, np.float32(2.0**-12), schedule.alpha),
        sigma=jnp.where(none, np.float32(np.sqrt(1 - 2.0**-24)), schedule.sigma),
    )
