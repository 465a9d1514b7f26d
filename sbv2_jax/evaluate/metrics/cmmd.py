"""CMMD: the maximum mean discrepancy of CLIP's features under a Gaussian kernel (Jayasumana et al., 2024)."""

import dataclasses

import numpy as np

from sbv2_jax.evaluate.metrics.discrepancy import discrepancies, discrepancy
from sbv2_jax.evaluate.metrics.metric import Metric, features

_SIGMA = 10.0
_PUBLISHED_SCALE = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMMD(Metric):
    """The squared MMD under exp(-|x - y|^2 / (2 * 10^2)), of features as they are given.

    The published figures are of CLIP ViT-L/14 at 336 px, its features of unit length. Unbiased, and so around 0
    for real against real; or `as_published`, which has each row's kernel with itself, and times 1000.
    """

    name = "cmmd"
    reads = ("real", "fake")
    as_published: bool = False

    @property
    def better(self):
        return {self._figure: "lower"}

    @property
    def _figure(self) -> str:
        return "cmmd_as_published" if self.as_published else "cmmd"

    @property
    def _scale(self) -> float:
        return _PUBLISHED_SCALE if self.as_published else 1.0

    def measure(self, *, real, fake):
        found = discrepancy(_gaussian, *_centred(real, fake), unbiased=not self.as_published)
        return {self._figure: self._scale * found}

    def resampled(self, weights, *, real, fake):
        found = discrepancies(_gaussian, *_centred(real, fake), weights, unbiased=not self.as_published)
        return {self._figure: self._scale * found}


def _centred(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns features moved to where rounding of their distances is least."""
    real, fake = features(real=real, fake=fake)
    return real - real.mean(0), fake - real.mean(0)


def _gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = a @ b.T
    squared *= -2.0
    squared += np.square(a).sum(1)[:, None]
    squared += np.square(b).sum(1)
    np.maximum(squared, 0.0, out=squared)
    squared /= -2.0 * _SIGMA**2
    return np.exp(squared, out=squared)
