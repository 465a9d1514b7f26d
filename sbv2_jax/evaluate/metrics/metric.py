"""A metric: which columns it reads, what it measures of them, and how it is measured again on a resample."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from sbv2_jax.errors import InputError, listed

# The columns that have a row for each generated picture; a resample weighs these rows.
OF_FAKES = ("fake", "probabilities", "similarity", "prompts")

Way = Literal["higher", "lower"]
Better = Mapping[str, Way | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One measure of generated pictures, over columns of numbers on the host; its fields are its settings.

    A subclass has a `name`; `reads`, the columns that `measure` takes as keyword arguments, and `takes`, those that
    it takes where they are given; `better`, for each figure "higher", "lower", or None where neither is; `interval`,
    how its interval is made: "bootstrap" over prompts, "subsample" (halves of the prompts) where the figure depends
    on the number of pictures, or None; and `resamples`, of how many.

    The columns: `real` [M, D], `fake` [N, D] and `train` [K, D], features by one extractor; `probabilities` [N, C],
    a classifier's, of the generated pictures; `similarity` [N] of each with its own caption; `prompts`, int [N],
    which prompt each is of.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    takes: ClassVar[tuple[str, ...]] = ()
    better: ClassVar[Better]
    interval: ClassVar[Literal["bootstrap", "subsample"] | None] = "bootstrap"
    resamples: ClassVar[int] = 1000

    @property
    def fewest(self) -> int:
        """How many generated pictures it needs."""
        return 2

    def measure(self, **columns: np.ndarray) -> dict[str, float]:
        """Returns its figures by name; raises InputError for columns of which it cannot be measured."""
        raise NotImplementedError

    def resampled(self, weights: np.ndarray, **columns: np.ndarray) -> dict[str, np.ndarray]:
        """Returns its figures, [B] each, where each generated picture counts as often as weights, int [B, N], say.

        A figure that does not depend on the generated pictures is left out. This one measures rows that are
        repeated; a metric that knows a quicker way overrides it.
        """
        found = []
        for counts in weights:
            rows = np.repeat(np.arange(len(counts)), counts)
            found.append(
                self.measure(
                    **{name: column[rows] if name in OF_FAKES else column for name, column in columns.items()}
                )
            )
        return {name: np.array([figures[name] for figures in found]) for name in found[0]}

    def columns(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns those of the given columns that it takes; raises InputError where one that it reads is missing."""
        if missing := [name for name in self.reads if given.get(name) is None]:
            raise InputError(f"the metric {self.name!r} needs {', '.join(missing)}, which it was not given")
        return {name: given[name] for name in (*self.reads, *self.takes) if given.get(name) is not None}


def features(fewest: int = 2, **columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns columns of features, [N, D] of the same D, in float64.

    Raises InputError for other shapes, fewer rows than `fewest`, and numbers that are not finite.
    """
    columns = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    shapes = [column.shape for column in columns.values()]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise InputError(f"features of {_all(columns)} must be [N, D], of one D, not {_all(shapes)}")
    if min(shape[0] for shape in shapes) < fewest:
        raise InputError(f"features of {_all(columns)} must have {fewest} rows at least, not {_all(shapes)}")
    for name, column in columns.items():
        _finite(name, column)
    return tuple(columns.values())


def scores(name: str, column: np.ndarray) -> np.ndarray:
    """Returns a column of one number for each picture, [N], in float64; raises InputError for anything else."""
    column = np.asarray(column, np.float64)
    if column.ndim != 1 or not len(column):
        raise InputError(f"{name} must be a number for each picture, [N], not of shape {column.shape}")
    _finite(name, column)
    return column


def weighted_mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the mean of values [N] or [N, C] under each row of weights [B, N]: [B] or [B, C]."""
    total = weights.sum(1)
    return weights @ values / (total if values.ndim == 1 else total[:, None])


def _finite(name: str, column: np.ndarray) -> None:
    if not np.isfinite(column).all():
        wrong = np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(1))
        raise InputError(
            f"{name} has numbers that are not finite in {len(wrong)} of {len(column)} rows: "
            f"{listed([str(row) for row in wrong], ', ')}"
        )


def _all(items: Iterable[Any]) -> str:
    return " and ".join(map(str, items))
