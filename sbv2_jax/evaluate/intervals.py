"""95% intervals of figures, and of differences of two models on the same prompts, by drawing prompts anew.

What is drawn are prompts, each with all its pictures: the pictures of one prompt are no independent witnesses.
Real and training pictures stay as they are, so an interval is about the model, against this reference.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics.metric import OF_FAKES, Metric

Columns = Mapping[str, np.ndarray]
# Fewer prompts say too little of how figures vary from prompt to prompt.
_FEWEST_PROMPTS = 20
_TAIL = 0.025
_NORMAL_TAIL = 1.959963984540054


class Interval(NamedTuple):
    """A figure and its 95% interval; low and high are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def intervals(
    metric: Metric, columns: Columns, *, resamples: int | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Returns the figures of a metric by name, each with its 95% interval.

    `columns` has what the metric reads and `prompts`, without which each picture is its own. A metric with
    "bootstrap" is measured on prompts drawn with replacement (Efron, 1979); the interval is of the quantiles of the
    deviations from their mean. With "subsample" it is measured on halves of the prompts, drawn without replacement:
    by n - b = b, such a figure deviates as the whole one does (Shao and Wu, 1989), and the interval is normal.
    `resamples` is of how many draws, the metric's own number where None. Fewer than 20 prompts have no interval.
    """
    figures = metric.measure(**metric.columns(columns))
    return _with_intervals(metric, figures, [columns], resamples, seed)


def differences(
    metric: Metric, columns: Columns, others: Columns, *, resamples: int | None = None, seed: int = 0
) -> dict[str, Interval]:
    """Returns the figures of one model minus those of another on the same prompts, each with its 95% interval.

    Both are measured on the same draws of prompts, so that what the prompts have in common cancels (`intervals`).
    Raises InputError where their prompts differ, and where their numbers of pictures do and the figure depends on it.
    """
    ours, theirs = (metric.measure(**metric.columns(one)) for one in (columns, others))
    figures = {name: value - theirs[name] for name, value in ours.items() if name in theirs}
    return _with_intervals(metric, figures, [columns, others], resamples, seed)


def _with_intervals(
    metric: Metric, figures: Mapping[str, float], models: list[Columns], resamples: int | None, seed: int
) -> dict[str, Interval]:
    names, *others = (np.unique(_prompts(metric, columns)) for columns in models)
    if any(not np.array_equal(names, its) for its in others):
        raise InputError(
            f"{metric.name}: two models are compared on the same prompts; these have {len(names)} and "
            f"{len(others[0])}, of which {len(np.intersect1d(names, others[0]))} are the same"
        )
    counts = [len(_prompts(metric, columns)) for columns in models]
    if metric.interval == "subsample" and min(counts) < max(counts):
        raise InputError(
            f"{metric.name} depends on the number of pictures: two models are compared at equal numbers, "
            f"not at {counts[0]} and {counts[1]}"
        )
    if metric.interval is None or len(names) < max(_FEWEST_PROMPTS, 2 * metric.fewest):
        return {name: Interval(value) for name, value in figures.items()}
    drawn = _draws(metric, len(names), metric.resamples if resamples is None else resamples, seed)
    found = []
    for columns in models:
        weights = drawn[:, np.searchsorted(names, _prompts(metric, columns))]
        found.append(metric.resampled(weights, **metric.columns(columns)))
    result = {name: Interval(value) for name, value in figures.items()}
    for name in figures.keys() & found[0].keys():
        values = found[0][name] - found[1][name] if len(found) > 1 else found[0][name]
        # Where a draw has nothing to measure, such as no prompt of several pictures, too few prompts have.
        if np.isfinite(values).all():
            low, high = _bounds(metric, values - values.mean(), len(names))
            result[name] = Interval(figures[name], figures[name] + low, figures[name] + high)
    return result


def _draws(metric: Metric, prompts: int, count: int, seed: int) -> np.ndarray:
    """Returns how often each prompt is drawn, int [count, prompts]."""
    rng = np.random.default_rng(seed)
    if metric.interval == "bootstrap":
        return rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=count).astype(np.int16)
    first = np.arange(prompts) < prompts // 2
    return np.stack([rng.permutation(first) for _ in range(count)]).astype(np.int16)


def _bounds(metric: Metric, deviations: np.ndarray, prompts: int) -> tuple[float, float]:
    if metric.interval == "bootstrap":
        # A resample varies by (n - 1) / n of what the sample does.
        scale = np.sqrt(prompts / (prompts - 1))
        low, high = scale * np.quantile(deviations, [_TAIL, 1.0 - _TAIL])
        return float(low), float(high)
    half = prompts // 2
    wide = _NORMAL_TAIL * float(deviations.std(ddof=1) * np.sqrt(half / (prompts - half)))
    return -wide, wide


def _prompts(metric: Metric, columns: Columns) -> np.ndarray:
    """Returns which prompt each generated picture is of, [N]."""
    counts = {name: len(columns[name]) for name in OF_FAKES if columns.get(name) is not None}
    read = {name: count for name, count in counts.items() if name in metric.reads}
    (count, *_), given = read.values(), columns.get("prompts")
    if given is None:
        return np.arange(count)
    if np.shape(given) != (count,):
        raise InputError(f"prompts must be one for each of {count} pictures, not of shape {np.shape(given)}")
    return np.asarray(given)
