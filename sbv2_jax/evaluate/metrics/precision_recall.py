"""Precision and recall of generated pictures (Kynkäänniemi et al., 2019): k nearest neighbours, edges included."""

import dataclasses
from typing import ClassVar

import numpy as np

from sbv2_jax.evaluate.metrics.metric import Better, Metric, features, weighted_mean
from sbv2_jax.evaluate.metrics.neighbours import distance_blocks, inside, nearest_others

# Among so many of a picture's neighbours, half a sample has the k nearest of its own.
_NEIGHBOURS_KEPT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRecall(Metric):
    """The share of generated pictures in the real manifold, and of real ones in the generated one (equation 1).

    A manifold is the balls around its pictures that reach to the k-th nearest other one; a picture on an edge is
    in it (`<=`).
    """

    name = "precision_recall"
    reads = ("real", "fake")
    better: ClassVar[Better] = {"precision": "higher", "recall": "higher"}
    # Recall rises with the number of generated pictures, and one that is drawn twice has no neighbour.
    interval = "subsample"
    k: int = 3

    @property
    def fewest(self):
        return self.k + 1

    def measure(self, *, real, fake):
        real, fake = features(self.fewest, real=real, fake=fake)
        return {
            "precision": float(_in_manifold(fake, real, self.k).mean()),
            "recall": float(_in_manifold(real, fake, self.k).mean()),
        }

    def resampled(self, weights, *, real, fake):
        real, fake = features(self.fewest, real=real, fake=fake)
        precise = _in_manifold(fake, real, self.k).astype(np.float64)
        return {
            "precision": weighted_mean(weights, precise),
            "recall": _resampled_recall(weights > 0, real, fake, self.k),
        }


def _in_manifold(points: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    radii = nearest_others(others, k)[0][:, -1]
    return np.concatenate([found.any(1) for _, found in inside(points, others, radii, edge=True)])


def _resampled_recall(chosen: np.ndarray, real: np.ndarray, fake: np.ndarray, k: int) -> np.ndarray:
    """Returns the share of real rows in the manifold of those of `fake` that are chosen, bool [B, N]."""
    distances, who = nearest_others(fake, min(len(fake) - 1, max(_NEIGHBOURS_KEPT, 8 * k)))
    radii = np.empty(chosen.shape)
    for drawn, its in zip(chosen, radii, strict=True):
        present = drawn[who]
        kth = (present.cumsum(1) == k) & present
        # Where fewer than k of those kept are drawn, the ball reaches to the last of them.
        kth[~kth.any(1), -1] = True
        its[:] = np.where(drawn, distances[kth], -1.0)
    covered = np.zeros(len(chosen))
    largest = radii.max(0)
    for _, squared, _ in distance_blocks(real, fake):
        i, j = np.nonzero(squared <= largest)
        squared = squared[i, j]
        for index, its in enumerate(radii):
            rows = i[squared <= its[j]]  # ascending
            covered[index] += np.count_nonzero(np.diff(rows, prepend=-1))
    return covered / len(real)
