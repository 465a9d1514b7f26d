"""Metrics over columns of features and scores, on the host in float64; one a file, by name in `METRICS`."""

from sbv2_jax.evaluate.metrics.clip_score import ClipScore
from sbv2_jax.evaluate.metrics.cmmd import CMMD
from sbv2_jax.evaluate.metrics.density_coverage import DensityCoverage
from sbv2_jax.evaluate.metrics.diversity import Diversity
from sbv2_jax.evaluate.metrics.frechet import Frechet
from sbv2_jax.evaluate.metrics.hpsv2 import HPSv2
from sbv2_jax.evaluate.metrics.inception_score import InceptionScore
from sbv2_jax.evaluate.metrics.kernel import Kernel
from sbv2_jax.evaluate.metrics.metric import Metric
from sbv2_jax.evaluate.metrics.nearest_train import NearestTrain
from sbv2_jax.evaluate.metrics.precision_recall import PrecisionRecall

# With other settings: dataclasses.replace(METRICS["precision_recall"], k=5).
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Frechet(),
        Kernel(),
        CMMD(),
        PrecisionRecall(),
        DensityCoverage(),
        ClipScore(),
        HPSv2(),
        InceptionScore(),
        Diversity(),
        NearestTrain(),
    )
}
