"""Diversity: how far the pictures of one prompt are from one another, which no distance of whole sets shows."""

import dataclasses
from typing import ClassVar

import numpy as np

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics.metric import Better, Metric, features, weighted_mean
from sbv2_jax.evaluate.metrics.neighbours import distance_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diversity(Metric):
    """The mean distance of two generated pictures of a prompt, and the mean of that over prompts.

    A prompt with one picture says nothing and is left out.
    """

    name = "diversity"
    reads = ("fake", "prompts")
    better: ClassVar[Better] = {"diversity": "higher"}

    def measure(self, *, fake, prompts):
        return {"diversity": float(np.mean([spread for _, spread in _spreads(fake, prompts)]))}

    def resampled(self, weights, *, fake, prompts):
        found = _spreads(fake, prompts)
        its = np.stack([weights[:, rows].mean(1) for rows, _ in found], axis=1)
        with np.errstate(invalid="ignore"):
            return {"diversity": weighted_mean(its, np.array([spread for _, spread in found]))}


def _spreads(fake: np.ndarray, prompts: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Returns for each prompt of several pictures their rows, and the mean distance of two of them."""
    (fake,) = features(fake=fake)
    if np.shape(prompts) != (len(fake),):
        raise InputError(f"prompts must be one for each of {len(fake)} pictures, not {np.shape(prompts)}")
    _, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    groups = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    found = [(rows, _mean_distance(fake[rows])) for rows in groups if len(rows) > 1]
    if not found:
        raise InputError("diversity within a prompt needs two pictures or more of some prompt")
    return found


def _mean_distance(points: np.ndarray) -> float:
    total = 0.0
    for rows, squared, _ in distance_blocks(points, points):
        np.fill_diagonal(squared[:, rows.start :], 0.0)
        total += np.sqrt(squared).sum()
    return total / (len(points) * (len(points) - 1))
