"""Distance to the nearest training picture: 0 for a picture that was learnt by heart."""

import dataclasses
from typing import ClassVar

import numpy as np

from sbv2_jax.evaluate.metrics.metric import Better, Metric, features, weighted_mean
from sbv2_jax.evaluate.metrics.neighbours import nearest

_LOW = 0.05
_CHUNK = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestTrain(Metric):
    """The distance of generated pictures from the training picture nearest to each: its mean, and its 5% quantile.

    Neither far nor near is better: near 0 they are copies, and far away they are no such pictures. The same of
    `real` pictures which were not trained on, where they are given, is what to compare with.
    """

    name = "nearest_train"
    reads = ("fake", "train")
    takes = ("real",)
    better: ClassVar[Better] = {
        "nearest_train": None,
        "nearest_train_low": None,
        "nearest_train_of_real": None,
        "nearest_train_of_real_low": None,
    }

    def measure(self, *, fake, train, real=None):
        found = {"nearest_train": _distances(fake, train)}
        if real is not None:
            found["nearest_train_of_real"] = _distances(real, train)
        figures = {}
        for name, distances in found.items():
            figures[name] = float(distances.mean())
            figures[f"{name}_low"] = float(_low(np.ones((1, len(distances))), distances)[0])
        return figures

    def resampled(self, weights, *, fake, train, real=None):
        distances = _distances(fake, train)
        return {
            "nearest_train": weighted_mean(weights, distances),
            "nearest_train_low": _low(weights, distances),
        }


def _distances(points: np.ndarray, train: np.ndarray) -> np.ndarray:
    return nearest(*features(1, pictures=points, train=train))


def _low(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the smallest value that 5% of the weight, [B, N], does not exceed, or the next above."""
    order = np.argsort(values)
    found = []
    for start in range(0, len(weights), _CHUNK):
        below = np.cumsum(weights[start : start + _CHUNK, order], axis=1)
        found.append(values[order][(below >= _LOW * below[:, -1:]).argmax(1)])
    return np.concatenate(found)
