"""AdamW with a global-norm clip and a learning-rate schedule."""

import jax.numpy as jnp
import optax


def learning_rate(peak: float, schedule: str, warmup: int, updates: int) -> optax.Schedule:
    """Returns the rate by update: linear from 0 over `warmup`, then constant, or a cosine to 0 at `updates`."""
    after = optax.constant_schedule(peak)
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, updates - warmup)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def adamw(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    mu_dtype: jnp.dtype = jnp.float32,
) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter, 2019) behind a clip of the global norm; 0 does not clip.

    `mu_dtype` is that of the stored first moment; the second, a small step's difference in which would round
    to nothing in bfloat16, stays float32.
    """
    optimizer = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer
