"""Inception score (IS): pictures of which a classifier is sure, and of many classes (Salimans et al., 2016)."""

import dataclasses
from typing import ClassVar

import numpy as np

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics.metric import Better, Metric, weighted_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionScore(Metric):
    """exp E KL(p(y|x) || p(y)), the mean over consecutive parts of the pictures, and its deviation over them.

    As published: ten parts, in the order of the rows, and the deviation of the parts themselves (no N - 1).
    """

    name = "inception_score"
    reads = ("probabilities",)
    better: ClassVar[Better] = {"inception_score": "higher", "inception_score_deviation": None}
    splits: int = 10

    @property
    def fewest(self):
        return self.splits

    def measure(self, *, probabilities):
        parts = self._parts(np.ones((1, len(probabilities))), probabilities)[:, 0]
        return {
            "inception_score": float(parts.mean()),
            "inception_score_deviation": float(parts.std()),
        }

    def resampled(self, weights, *, probabilities):
        # A part of which a resample has no row is left out of its mean.
        return {"inception_score": np.nanmean(self._parts(weights, probabilities), axis=0)}

    def _parts(self, weights: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Returns the score of every part, [splits, B], under weights [B, N]."""
        p = np.asarray(probabilities, np.float64)
        if p.ndim != 2 or len(p) < self.splits:
            raise InputError(f"probabilities must be [N, C] of {self.splits} rows at least, not {p.shape}")
        if not (p >= 0).all() or np.abs(p.sum(1) - 1.0).max() > 1e-3:
            raise InputError("probabilities must be of sum 1 in every row: a softmax, not its logits")
        certain = _times_log(p).sum(1)
        edges = np.arange(self.splits + 1) * len(p) // self.splits
        parts = []
        for start, stop in zip(edges, edges[1:], strict=False):
            its = weights[:, start:stop]
            with np.errstate(invalid="ignore"):
                marginal = weighted_mean(its, p[start:stop])
                divergence = weighted_mean(its, certain[start:stop]) - _times_log(marginal).sum(1)
            parts.append(np.exp(divergence))
        return np.stack(parts)


def _times_log(p: np.ndarray) -> np.ndarray:
    """Returns p log p, 0 where p is."""
    return p * np.log(np.where(p > 0, p, 1.0))
