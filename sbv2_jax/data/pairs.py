"""Pairs of noise and what a teacher draws of it, as `launch/pairs.py` leaves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.data.latent_sets import LatentSet
from sbv2_jax.distill.terms.regression import LATENTS, NUMBERS, SEEDS


class Pairs(LatentSet):
    """A random-access source of pairs: prompt, teacher's latent, and the number and seed of its noise.

    The noise of pair i is `initial_noise(seed, [i], latent_shape)`.
    """

    THING, THINGS, MAKER = "pair", "pairs", "launch/pairs.py"
    TYPES: ClassVar[Mapping[str, type]] = {
        "seed": int,
        "steps": int,
        "guidance": float,
        "sampler": str,
        "precision": str,
        "prompts": str,
    }

    def wrong(self, manifest: Mapping[str, Any]) -> list[str]:
        """Returns "seed" for one that is none."""
        return [] if 0 <= manifest["seed"] < 2**32 else ["seed"]

    def columns(self, number: int, latent: np.ndarray) -> dict[str, np.ndarray | np.generic]:
        """Returns the latent, and what its noise is drawn from."""
        return {NUMBERS: np.int32(number), SEEDS: np.uint32(self.manifest["seed"]), LATENTS: latent}


def open_pairs(config: ConfigDict) -> Pairs:
    """Returns the pairs of a run, `config.pairs.path`."""
    return Pairs(Path(config.pairs.path).expanduser(), "config.pairs.path = ")
