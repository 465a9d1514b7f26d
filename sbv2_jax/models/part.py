"""A network as its files describe it, before any weight is read."""

import dataclasses
from pathlib import Path
from typing import Generic

from sbv2_jax.errors import InputError
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.config import Kind
from sbv2_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Generic[Kind]):
    """One component: its configuration, and the directory of its weights (None for a published shape).

    `image` tells how a CLIP takes its pictures, and `tokenizer` makes its tokens; both are None for every other
    network, and the second for a published shape.
    """

    config: Kind
    directory: Path | None
    image: CLIPImageConfig | None = None
    tokenizer: Tokenizer | None = None

    @property
    def files(self) -> Path:
        """The directory of its weights; raises InputError for a published shape."""
        if self.directory is None:
            raise InputError(f"a {type(self.config).__name__} of published shapes has no weights")
        return self.directory
