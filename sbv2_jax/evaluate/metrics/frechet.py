"""Fréchet distance (FD): FID with the features of Inception's last pooling; with another extractor, name it.

A float32 covariance of thousands of features is off by more than the differences that people report.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from sbv2_jax.evaluate.metrics.metric import Better, Metric, features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frechet(Metric):
    """Fréchet distance of features, `frechet_distance`, which falls with N: compare at equal N."""

    name = "frechet"
    reads = ("real", "fake")
    better: ClassVar[Better] = {"frechet": "lower"}
    interval = "subsample"
    # Each takes the eigenvalues of a [D, D] matrix: seconds where D is 2048.
    resamples = 100

    def measure(self, *, real, fake):
        return {"frechet": frechet_distance(real, fake)}

    def resampled(self, weights, *, real, fake):
        real, fake = features(real=real, fake=fake)
        fake = fake - real.mean(0)
        real = real - real.mean(0)
        values, vectors = np.linalg.eigh(real.T @ real / (len(real) - 1))
        values = np.maximum(values, 0.0)
        # The root of the covariances' product has the singular values of the rows times the root of the real one.
        seen = fake @ (vectors * np.sqrt(values))
        squares = np.square(fake).sum(1)
        found = []
        for counts in weights:
            rows = np.repeat(np.arange(len(counts)), counts)
            mean = fake[rows].mean(0)
            variance = (squares[rows].sum() - len(rows) * mean @ mean) / (len(rows) - 1)
            part = seen[rows]
            part -= part.mean(0)
            gram = part.T @ part if len(rows) > part.shape[1] else part @ part.T
            root = np.sqrt(np.maximum(np.linalg.eigvalsh(gram / (len(rows) - 1)), 0.0)).sum()
            found.append(mean @ mean + values.sum() + variance - 2.0 * root)
        return {"frechet": np.array(found)}


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Returns the Fréchet distance of the Gaussians fitted to two sets of features, [M, D] and [N, D].

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), with unbiased covariances (Heusel et al., 2017, equation 6).
    It falls with N: compare at equal N, and beside the distance of real from real. Raises InputError for fewer
    than two rows.
    """
    real, fake = features(real=real, fake=fake)
    difference = real.mean(0) - fake.mean(0)
    scaled = [rows - rows.mean(0) for rows in (real, fake)]
    for rows in scaled:
        rows /= np.sqrt(len(rows) - 1)
    variances = sum(np.vdot(rows, rows) for rows in scaled)
    return float(difference @ difference + variances - 2.0 * _trace_of_root(*scaled))


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
    """Returns tr((A^T A B^T B)^(1/2)) of A [N, D] and B [M, D].

    It is the nuclear norm of A B^T. Where the covariances are smaller than that product they are used instead, by
    symmetric eigenvalues, which rounding cannot make complex.
    """
    if min(len(a), len(b)) < a.shape[1]:
        return np.linalg.svd(a @ b.T, compute_uv=False).sum()
    values, vectors = np.linalg.eigh(a.T @ a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(root @ (b.T @ b) @ root), 0.0)).sum()
