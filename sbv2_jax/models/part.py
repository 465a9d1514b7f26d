"""A network as its files describe it, before any weight is read."""

import dataclasses
from pathlib import Path

from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One component: its configuration, and the directory of its weights (None for a published shape).

    `image` tells how a CLIP takes its pictures, and `tokenizer` makes its tokens; both are None for every other
    network, and the second for a published shape.
    """

    config: ModelConfig
    directory: Path | None
    image: CLIPImageConfig | None = None
    tokenizer: Tokenizer | None = None
