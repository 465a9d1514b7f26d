"""The decay of averaged weights."""

import jax
import jax.numpy as jnp


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
    """Decay of the average in the update after `step` others: min(decay, (1 + n) / (10 + n)), float32.

    The ramp lets an early average forget the weights that training started from. Source: SwiftBrush's published code,
    by diffusers' EMAModel, which has 0 in place of 1/10 for the first update.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))
