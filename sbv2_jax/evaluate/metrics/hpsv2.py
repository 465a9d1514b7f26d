"""HPSv2: what people would prefer, by a CLIP ViT-H/14 that was fitted to their choices (Wu et al., 2023)."""

import dataclasses
from typing import ClassVar

from sbv2_jax.evaluate.metrics.metric import Better, Metric, scores, weighted_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class HPSv2(Metric):
    """A hundred times the mean cosine of pictures and their prompts, as in the published tables.

    Those are of 800 prompts of each of four styles, one figure for each style.
    """

    name = "hpsv2"
    reads = ("similarity",)
    better: ClassVar[Better] = {"hpsv2": "higher"}

    def measure(self, *, similarity):
        return {"hpsv2": 100.0 * float(scores("similarity", similarity).mean())}

    def resampled(self, weights, *, similarity):
        return {"hpsv2": 100.0 * weighted_mean(weights, scores("similarity", similarity))}
