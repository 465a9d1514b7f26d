"""CLIP score: how well pictures fit their captions in the eyes of one CLIP, which the figure must name."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.models.clip_image import CLIPImageConfig, preprocess
from sbv2_jax.models.registry import network
from sbv2_jax.models.tokenizer import Tokenizer

_BATCH = 100


def clip_score(
    clip: Component,
    tokenizer: Tokenizer,
    image: CLIPImageConfig,
    pictures: np.ndarray,
    captions: Sequence[str],
) -> float:
    """Returns the mean cosine of pictures, uint8 [N, H, W, 3], and their captions (Hessel et al., 2021, section 3).

    The raw cosine: neither weighted by 2.5 nor clipped at 0. `clip` is a CLIPModel with its `tokenizer`; `image`
    says how it takes pictures.
    """
    net = network(clip.config)

    @jax.jit
    def cosine(pixels: jax.Array, ids: jax.Array) -> jax.Array:
        pixels = preprocess(
            pixels.astype(jnp.float32) / 127.5 - 1.0, image.size, image.image_mean, image.image_std
        )
        seen, said = (
            net.apply(clip.params, x, method=method)
            for x, method in ((pixels, "image_features"), (ids, "text_features"))
        )
        norms = jnp.linalg.norm(seen, axis=-1) * jnp.linalg.norm(said, axis=-1)
        return (seen * said).sum(-1) / norms

    ids = tokenizer.encode(captions)
    parts = [
        np.asarray(cosine(pictures[start : start + _BATCH], ids[start : start + _BATCH]), np.float64)
        for start in range(0, len(pictures), _BATCH)
    ]
    return float(np.concatenate(parts).mean())
