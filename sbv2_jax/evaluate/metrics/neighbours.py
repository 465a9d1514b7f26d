"""Distances between many rows of features, in blocks, and what is near to what: exact where a comparison is close.

A block of squared distances is |a|^2 + |b|^2 - 2 a.b, which rounding moves by some 1e-13 of the norms. A copy of a
picture lies exactly on the edge of a ball, so whatever is that near to an edge is computed again from a - b.
"""

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 64 * 2**20
# Of so many candidates beyond the k-th the nearest are told apart; more than that are equal but for rounding.
_SPARE = 16


def block_rows(columns: int) -> int:
    """Returns how many rows of float64 a block has, which is of so many columns."""
    return max(1, BLOCK_BYTES // (8 * columns))


def distance_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields, for block after block of the rows of a: its slice, its squared distances from b, and their doubt.

    a is [N, D], b [M, D]; the distances are [n, M], of which no more than the doubt, [n, 1], is rounding.
    """
    centre = b.mean(0)
    a, b = a - centre, b - centre
    norms, others = np.square(a).sum(1), np.square(b).sum(1)
    step = block_rows(len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        squared = a[rows] @ b.T
        squared *= -2.0
        squared += norms[rows, None]
        squared += others
        np.maximum(squared, 0.0, out=squared)
        doubt = 2.0 * a.shape[1] * np.finfo(np.float64).eps * (norms[rows] + others.max())
        yield rows, squared, doubt[:, None]


def nearest_others(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the squared distances of points [N, D] from their k nearest others, ascending, and who they are.

    Both are [N, k]; copies of a point are others. The k-th is exact, the rest but for rounding.
    """
    distances = np.empty((len(points), k))
    who = np.empty((len(points), k), np.int64)
    count = min(k + _SPARE, len(points) - 1)
    for rows, squared, doubt in distance_blocks(points, points):
        own = np.arange(rows.start, rows.stop)
        squared[np.arange(len(own)), own] = np.inf
        near = np.argpartition(squared, count - 1, axis=1)[:, :count]
        squared = np.take_along_axis(squared, near, 1)
        last = np.partition(squared, k - 1, axis=1)[:, k - 1 : k]
        i, j = np.nonzero(np.abs(squared - last) <= 2.0 * doubt)
        squared[i, j] = _exactly(points, own[i], points, near[i, j])
        order = np.argsort(squared, axis=1, kind="stable")[:, :k]
        distances[rows] = np.take_along_axis(squared, order, 1)
        who[rows] = np.take_along_axis(near, order, 1)
    return distances, who


def nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the distance of each of points [N, D] from the nearest of others [M, D]: 0 for a copy."""
    who = np.concatenate([squared.argmin(1) for _, squared, _ in distance_blocks(points, others)])
    return np.sqrt(_exactly(points, np.arange(len(points)), others, who))


def inside(
    points: np.ndarray, centres: np.ndarray, squared_radii: np.ndarray, *, edge: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields, for block after block of points [N, D], its slice and which balls each lies in, bool [n, M].

    The balls are around centres [M, D], of squared radii [M]; with or without their edge.
    """
    compare = np.less_equal if edge else np.less
    for rows, squared, doubt in distance_blocks(points, centres):
        found = compare(squared, squared_radii)
        squared -= squared_radii
        i, j = np.nonzero(np.abs(squared, out=squared) <= doubt)
        found[i, j] = compare(_exactly(points, rows.start + i, centres, j), squared_radii[j])
        yield rows, found


def _exactly(a: np.ndarray, i: np.ndarray, b: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Returns the squared distances of rows i of a from rows j of b, from their differences."""
    step = block_rows(a.shape[1])
    parts = [
        np.square(a[i[start : start + step]] - b[j[start : start + step]]).sum(1)
        for start in range(0, len(i), step)
    ]
    return np.concatenate(parts) if parts else np.empty(0)
