"""Latents of real pictures with their captions, as `launch/latents.py` leaves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.data.latent_sets import LatentSet
from sbv2_jax.distill.terms.gan import LATENTS, REAL


class RealLatents(LatentSet):
    """A random-access source of real pictures: the caption as the prompt, and the latent."""

    THING, THINGS, MAKER = "latent", "latents", "launch/latents.py"
    TYPES: ClassVar[Mapping[str, type]] = {"pictures": str}

    def columns(self, number: int, latent: np.ndarray) -> dict[str, np.ndarray | np.generic]:
        """Returns the latent, and that it is there."""
        return {LATENTS: latent, REAL: np.bool_(True)}


def open_real_latents(config: ConfigDict) -> RealLatents:
    """Returns the real latents of a run, `config.gan.path`."""
    return RealLatents(Path(config.gan.path).expanduser(), "config.gan.path = ")
