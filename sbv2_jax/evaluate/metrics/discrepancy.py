"""The squared maximum mean discrepancy of two sets of features under a kernel, in blocks, and of weighted rows."""

from collections.abc import Callable

import numpy as np

from sbv2_jax.evaluate.metrics.neighbours import block_rows

# From rows [n, D] and [m, D] to [n, m].
KernelFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def discrepancy(
    kernel: KernelFunction, real: np.ndarray, fake: np.ndarray, *, unbiased: bool = True
) -> float:
    """Returns the squared MMD of two sets of features, [M, D] and [N, D] (Gretton et al., 2012, lemma 6).

    Unbiased, without the kernel of a row with itself (equation 3), or with it (equation 5).
    """
    return float(discrepancies(kernel, real, fake, np.ones((1, len(fake))), unbiased=unbiased)[0])


def discrepancies(
    kernel: KernelFunction, real: np.ndarray, fake: np.ndarray, weights: np.ndarray, *, unbiased: bool = True
) -> np.ndarray:
    """Returns the squared MMD, [B], where the rows of `fake` count as often as weights [B, N] say.

    A row that is drawn twice is no pair with itself, or a resample would be further from `real` than the whole.
    """
    weights = np.asarray(weights, np.float64)
    constant = _within(kernel, real, np.ones((1, len(real))), unbiased)
    across = weights @ _across(kernel, fake, real) / weights.sum(1)
    return constant + _within(kernel, fake, weights, unbiased) - 2.0 * across


def _within(kernel: KernelFunction, rows: np.ndarray, weights: np.ndarray, unbiased: bool) -> np.ndarray:
    """Returns the mean kernel of two rows, [B], under each of the weights [B, N]."""
    total = np.zeros(len(weights))
    step = block_rows(len(rows))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        gram = kernel(rows[part], rows[start:])
        size = len(gram)
        if unbiased:
            np.fill_diagonal(gram, 0.0)
        # The kernel is symmetric: what is right of the block's own square counts twice.
        gram[:, size:] *= 2.0
        total += np.einsum("bn,nb->b", weights[:, part], gram @ weights[:, start:].T)
    counts = weights.sum(1)
    return total / (np.square(counts) - (np.square(weights).sum(1) if unbiased else 0.0))


def _across(kernel: KernelFunction, fake: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Returns the mean kernel of each row of `fake` with those of `real`, [N]."""
    step = block_rows(len(real))
    return np.concatenate(
        [kernel(fake[start : start + step], real).mean(1) for start in range(0, len(fake), step)]
    )
