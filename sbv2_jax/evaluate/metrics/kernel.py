"""Kernel distance (KD): KID with the features of Inception's last pooling; with another extractor, name it."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from sbv2_jax.evaluate.metrics.discrepancy import discrepancies, discrepancy
from sbv2_jax.evaluate.metrics.metric import Better, Metric, features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel(Metric):
    """Kernel distance of all rows of features, `kernel_distance`, unbiased: it can be below 0."""

    name = "kernel"
    reads = ("real", "fake")
    better: ClassVar[Better] = {"kernel": "lower"}

    def measure(self, *, real, fake):
        return {"kernel": kernel_distance(real, fake)}

    def resampled(self, weights, *, real, fake):
        real, fake = features(real=real, fake=fake)
        return {"kernel": discrepancies(_cubic, real, fake, weights)}


def kernel_distance(
    real: np.ndarray,
    fake: np.ndarray,
    subsets: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> float:
    """Returns the squared maximum mean discrepancy of two sets of features, [M, D] and [N, D], unbiased.

    The kernel is (x . y / D + 1)^3 (Binkowski et al., 2018, section 4). `subsets` holds pairs of row indices, of
    real and of fake, whose mean is returned; without it all rows are one subset. It can be below 0. Raises
    InputError for fewer than two rows.
    """
    real, fake = features(real=real, fake=fake)
    if subsets is None:
        return discrepancy(_cubic, real, fake)
    chosen = [features(real=real[rows], fake=fake[others]) for rows, others in subsets]
    return float(np.mean([discrepancy(_cubic, *pair) for pair in chosen]))


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    gram = a @ b.T
    gram /= a.shape[1]
    gram += 1.0
    return gram * gram * gram
