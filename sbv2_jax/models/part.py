"""A network as its files describe it, before any weight is read."""

import dataclasses
from pathlib import Path

from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One component: its configuration, and the directory of its weights (None for a published shape).

    `image` tells how a CLIP takes its pictures, and is None for every other network.
    """

    config: ModelConfig
    directory: Path | None
    image: CLIPImageConfig | None = None
