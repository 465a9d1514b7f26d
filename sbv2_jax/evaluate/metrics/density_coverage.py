"""Density and coverage of generated pictures (Naeem et al., 2020): balls around real pictures, without edges."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from sbv2_jax.evaluate.metrics.metric import Better, Metric, features, weighted_mean
from sbv2_jax.evaluate.metrics.neighbours import inside, nearest_others


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityCoverage(Metric):
    """In how many real balls a generated picture lies, over k, and the share of real balls that have one.

    A ball reaches to the k-th nearest other real picture; one on its edge is outside (`<`), as in the published
    program. Density is 1 for real against real, and can be above it.
    """

    name = "density_coverage"
    reads = ("real", "fake")
    better: ClassVar[Better] = {"density": "higher", "coverage": "higher"}
    # Coverage rises with the number of generated pictures.
    interval = "subsample"
    k: int = 5

    def measure(self, *, real, fake):
        real, fake = self._features(real, fake)
        counts = np.zeros(len(fake), np.int64)
        covered = np.zeros(len(real), bool)
        for rows, found in self._inside(real, fake):
            counts[rows] = found.sum(1)
            covered |= found.any(0)
        return {"density": float(counts.mean() / self.k), "coverage": float(covered.mean())}

    def resampled(self, weights, *, real, fake):
        real, fake = self._features(real, fake)
        counts = np.zeros(len(fake))
        covered = np.zeros((len(weights), len(real)), bool)
        chosen = weights > 0
        for rows, found in self._inside(real, fake):
            counts[rows] = found.sum(1)
            i, j = np.nonzero(found)
            for its, drawn in zip(covered, chosen[:, rows], strict=True):
                its[j[drawn[i]]] = True
        return {"density": weighted_mean(weights, counts) / self.k, "coverage": covered.mean(1)}

    def _features(self, real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, ...]:
        (real,) = features(self.k + 1, real=real)
        return features(real=real, fake=fake)

    def _inside(self, real: np.ndarray, fake: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        return inside(fake, real, nearest_others(real, self.k)[0][:, -1], edge=False)
