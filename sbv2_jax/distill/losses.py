"""The losses of SwiftBrush v2: float32 arrays in, one unreduced float32 value for each sample [B] out."""

import jax
import jax.numpy as jnp

from sbv2_jax.diffusion.schedule import Schedule, coefficients, epsilon_to_x0

WEIGHTINGS = ("sbv2", "dmd")


def vsd_gradient(
    schedule: Schedule,
    weighting: str,
    x: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    teacher_epsilon: jax.Array,
    score_epsilon: jax.Array,
) -> jax.Array:
    """Returns the direction, [B, h, w, C], along which a descent of x approaches the teacher's distribution.

    x is the student's sample, x_t its noised version at t [B], the two epsilons are the guided predictions
    for x_t. Weighting "sbv2": s_t^2 (eps_T - eps_S) (ProlificDreamer, Wang et al., 2023, equation 9, with
    SwiftBrush's weight). "dmd": (x0_S - x0_T) / mean |x - x0_T| (Yin et al., 2024, equations 7 and 8); the
    two differ by a factor for each sample alone, as s_t^2 (eps_T - eps_S) = s_t a_t (x0_S - x0_T).
    Raises TypeError unless every array is float32.
    """
    _, s = coefficients(schedule, t, x, x_t, teacher_epsilon, score_epsilon)
    if weighting == "sbv2":
        return s**2 * (teacher_epsilon - score_epsilon)
    if weighting == "dmd":
        teacher_x0 = epsilon_to_x0(schedule, teacher_epsilon, x_t, t)
        score_x0 = epsilon_to_x0(schedule, score_epsilon, x_t, t)
        error = jnp.mean(jnp.abs(x - teacher_x0), axis=_inner(x), keepdims=True)
        return (score_x0 - teacher_x0) / error
    raise ValueError(f"weighting={weighting!r} is none of {WEIGHTINGS}")


def vsd_loss(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns 1/2 mean |x - sg(x - gradient)|^2, [B], whose gradient to x is `gradient` over a sample's size.

    The surrogate of DMD (Yin et al., 2024, appendix); its value tells the gradient's size, nothing more.
    """
    target = jax.lax.stop_gradient(x - gradient)
    return 0.5 * jnp.mean((x - target) ** 2, axis=_inner(x))


def score_loss(schedule: Schedule, epsilon: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns a_t^2 mean |epsilon - noise|^2, [B]: denoising, weighted as in SwiftBrush's training.

    epsilon is the score model's prediction, noise what was added, both [B, h, w, C]; t int32 [B].
    """
    a, _ = coefficients(schedule, t, epsilon, noise)
    return jnp.mean((a * (epsilon - noise)) ** 2, axis=_inner(epsilon))


def clamped_clip_loss(image_features: jax.Array, text_features: jax.Array, tau: float) -> jax.Array:
    """Returns max(0, tau - cosine), [B], of features [B, D] (SwiftBrush v2, section 4.2).

    The clamp is per sample: one that agrees with its text by more than tau is left alone.
    """
    return jax.nn.relu(tau - cosine(image_features, text_features))


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the cosine between vectors [B, D], [B]."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / norms


def _inner(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))
