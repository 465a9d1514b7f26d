"""Distances between two sets of features, in float64 on the host: Fréchet and kernel distance.

With the features of Inception's last pooling these are FID and KID; with another extractor, name it.
A float32 covariance of thousands of features is off by more than the differences that people report.
"""

from collections.abc import Iterable

import numpy as np


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Returns the Fréchet distance of the Gaussians fitted to two sets of features, [N, D] and [M, D].

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), with unbiased covariances (Heusel et al., 2017, equation 6).
    It falls with N: compare at equal N, and beside the distance of real from real. Raises ValueError for fewer
    than two rows.
    """
    real, fake = _features(real, fake)
    centred = [rows - rows.mean(0) for rows in (real, fake)]
    difference = real.mean(0) - fake.mean(0)
    variances = [np.square(rows).sum() / (len(rows) - 1) for rows in centred]
    root = _trace_of_root(*(rows / np.sqrt(len(rows) - 1) for rows in centred))
    return float(difference @ difference + sum(variances) - 2.0 * root)


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


def kernel_distance(
    real: np.ndarray,
    fake: np.ndarray,
    subsets: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> float:
    """Returns the squared maximum mean discrepancy of two sets of features, [N, D] and [M, D], unbiased.

    The kernel is (x . y / D + 1)^3 (Binkowski et al., 2018, section 4). `subsets` holds pairs of row indices, of
    real and of fake, whose mean is returned; without it all rows are one subset. It can be below 0. Raises
    ValueError for fewer than two rows.
    """
    real, fake = _features(real, fake)
    if subsets is None:
        return _unbiased_mmd(real, fake)
    return float(np.mean([_unbiased_mmd(*_features(real[rows], fake[others])) for rows, others in subsets]))


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def within(a: np.ndarray) -> float:
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2.0 * kernel(x, y).mean())


def _features(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(
            f"features must be [N, D] and [M, D], N and M >= 2, not {real.shape} and {fake.shape}"
        )
    return np.asarray(real, np.float64), np.asarray(fake, np.float64)
