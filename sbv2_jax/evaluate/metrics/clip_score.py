"""CLIP score: how well pictures fit their captions in the eyes of one CLIP, which the figure must name."""

import dataclasses
from typing import ClassVar

from sbv2_jax.evaluate.metrics.metric import Better, Metric, scores, weighted_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipScore(Metric):
    """The mean cosine of pictures and their captions (Hessel et al., 2021, section 3).

    The raw cosine: neither weighted by 2.5 nor clipped at 0.
    """

    name = "clip_score"
    reads = ("similarity",)
    better: ClassVar[Better] = {"clip_score": "higher"}

    def measure(self, *, similarity):
        return {"clip_score": float(scores("similarity", similarity).mean())}

    def resampled(self, weights, *, similarity):
        return {"clip_score": weighted_mean(weights, scores("similarity", similarity))}
