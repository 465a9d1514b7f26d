"""CLIP score: how well pictures fit their captions in the eyes of one CLIP, which the figure must name."""

from collections.abc import Sequence

import numpy as np

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.evaluate.extractors.image_text import image_text
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.tokenizer import Tokenizer


def clip_score(
    clip: Component,
    tokenizer: Tokenizer,
    image: CLIPImageConfig,
    pictures: np.ndarray,
    captions: Sequence[str],
) -> float:
    """Returns the mean cosine of pictures, uint8 [N, H, W, 3], and their captions (Hessel et al., 2021, section 3).

    `clip` is a CLIPModel with its `tokenizer`; `image` says how it takes pictures.
    """
    return float(image_text(clip, tokenizer, image).similarity(pictures, captions).mean())
