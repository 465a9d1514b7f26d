"""The losses of pre-training: arrays in, unreduced [B] out, float32."""

import jax
import jax.numpy as jnp

from sbv2_jax.diffusion.schedule import Schedule, coefficients, x0_to_v

_SCALES = 3


def picture_loss(images: jax.Array, targets: jax.Array, edges: float) -> jax.Array:
    """Returns how far pictures [B, H, W, 3] are from their targets, [B].

    The mean absolute difference of the pixels, twice its mean square, and `edges` times the mean absolute
    difference of neighbours' differences at full, half and quarter resolution. The square gets the colours of
    flat areas right early, the last part punishes blur, which the others hardly see in a drawing that is mostly
    flat: it stands in for a perceptual network, of which a world of its own has none.
    """
    error = images - targets
    total = _mean(jnp.abs(error)) + 2.0 * _mean(jnp.square(error))
    for _ in range(_SCALES):
        across, down = jnp.diff(error, axis=2), jnp.diff(error, axis=1)
        total = total + edges / _SCALES * (_mean(jnp.abs(across)) + _mean(jnp.abs(down)))
        error = _halve(error)
    return total


def kl_divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Returns the KL divergence from N(mean, exp(log_variance)) to N(0, 1), its mean over the latents, [B].

    Kingma and Welling, 2014, appendix B.
    """
    return 0.5 * _mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)


def contrastive_loss(logits: jax.Array) -> jax.Array:
    """Returns CLIP's symmetric cross-entropy of logits [B, B] whose diagonal is right, [B].

    Radford et al., 2021, figure 3.
    """
    right = jnp.diagonal(logits)
    of_images = jax.nn.logsumexp(logits, axis=1) - right
    of_texts = jax.nn.logsumexp(logits, axis=0) - right
    return 0.5 * (of_images + of_texts)


def velocity_loss(
    schedule: Schedule, output: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array, snr_limit: float
) -> jax.Array:
    """Returns the weighted squared error of a predicted v, [B]; arrays float32 [B, h, w, c], t int32 [B].

    In terms of x0 the weight is min(SNR, snr_limit) + 1: the "SNR + 1" of Salimans and Ho (2022, section 4),
    limited as by Hang et al. (2023, equation 6). The limit spares the network the pixel noise that no one
    sees; the 1 keeps it learning at T - 1, where the distilled student will live, and min-SNR alone goes to 0.
    """
    a, s = coefficients(schedule, t, output)
    snr = jnp.square(a / s)
    weight = (jnp.minimum(snr, snr_limit) + 1.0) / (snr + 1.0)
    return _mean(weight * jnp.square(output - x0_to_v(schedule, x0, x_t, t)))


def _halve(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(tuple(range(1, x.ndim)))
