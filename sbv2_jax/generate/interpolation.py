"""Ways between two noises, and between two prompts: spherical linear interpolation."""

import jax
import jax.numpy as jnp

from sbv2_jax.models.conditions import Text

# Of vectors that are nearly parallel the sines say nothing: there, it is a straight line.
_PARALLEL = 1e-4


def slerp(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Returns vectors [..., D] on the arc from `first`, share 0, to `second`, share 1.

    The arrays are broadcast to each other; `share` has the shape of one without its last axis. Between two noises of
    the standard normal distribution a vector has the length that such noise has, where the straight line cuts inside.
    Source: Shoemake, 1985; SwiftBrush v2 interpolates with it (Dao et al., 2024, sections 8.3 and 8.4).
    """
    share = jnp.asarray(share)[..., None]
    lengths = jnp.linalg.norm(first, axis=-1, keepdims=True) * jnp.linalg.norm(second, axis=-1, keepdims=True)
    cosine = jnp.sum(first * second, axis=-1, keepdims=True) / jnp.maximum(lengths, 1e-30)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    straight = jnp.sin(angle) < _PARALLEL
    sine = jnp.where(straight, 1.0, jnp.sin(angle))
    before = jnp.where(straight, 1.0 - share, jnp.sin((1.0 - share) * angle) / sine)
    after = jnp.where(straight, share, jnp.sin(share * angle) / sine)
    return before * first + after * second


def between_noises(first: jax.Array, second: jax.Array, shares: jax.Array) -> jax.Array:
    """Returns noise [F, h, w, c] between two of [h, w, c], each taken as one vector, at the shares [F]."""
    found = slerp(first.reshape(1, -1), second.reshape(1, -1), shares)
    return found.reshape(-1, *first.shape)


def between_texts(first: Text, second: Text, shares: jax.Array) -> Text:
    """Returns conditions of F rows between those of one row each, token by token, at the shares [F].

    What SDXL is told of the picture's size is that of the first.
    """
    context = slerp(first.plain, second.plain, shares[:, None])
    if first.added is None or second.added is None:
        return Text(context)
    pooled = slerp(first.added.text_embeds, second.added.text_embeds, shares)
    sizes = jnp.broadcast_to(first.added.time_ids, (len(shares), first.added.time_ids.shape[-1]))
    return Text(context, first.added._replace(text_embeds=pooled, time_ids=sizes))
