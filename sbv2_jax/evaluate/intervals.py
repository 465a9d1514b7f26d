"""95% intervals of figures, and of differences of two models on the same prompts, by drawing prompts anew.

What is drawn are prompts, each with all its pictures: the pictures of one prompt are no independent witnesses.
Real and training pictures stay as they are, so an interval is about the model, against this reference.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

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


class Drawn(NamedTuple):
    """What a metric gives of one model: its figures, and each of them again on every draw of prompts, [B].

    `prompts` are the model's, in order, and `pictures` how many it has of them.
    """

    figures: dict[str, float]
    resampled: dict[str, np.ndarray]
    prompts: np.ndarray
    pictures: int


def drawn(metric: Metric, columns: Columns, *, resamples: int | None = None, seed: int = 0) -> Drawn:
    """Measures a metric of one model, and of its prompts drawn anew: what `intervals` and `differences` are made of.

    `columns` has what the metric reads and `prompts`, without which each picture is its own. A metric with
    "bootstrap" is measured on prompts drawn with replacement (Efron, 1979), with "subsample" on halves of the
    prompts, drawn without. `resamples` is of how many draws, the metric's own number where None. Models of the same
    prompts are measured on the same draws. Fewer than 20 prompts are not drawn.
    """
    its = metric.columns(columns)
    figures, of = metric.measure(**its), _prompts(metric, columns)
    names = np.unique(of)
    if metric.interval is None or len(names) < max(_FEWEST_PROMPTS, 2 * metric.fewest):
        return Drawn(figures, {}, names, len(of))
    draws = _draws(metric, len(names), metric.resamples if resamples is None else resamples, seed)
    return Drawn(figures, metric.resampled(draws[:, np.searchsorted(names, of)], **its), names, len(of))


def intervals(metric: Metric, ours: Drawn) -> dict[str, Interval]:
    """Returns the figures of a model by name, each with its 95% interval.

    Of a bootstrap it is of the quantiles of the deviations from their mean. Of halves of the prompts it is normal:
    by n - b = b, a figure deviates there as the whole one does (Shao and Wu, 1989).
    """
    return _with_intervals(metric, ours.figures, ours.resampled, len(ours.prompts))


def differences(metric: Metric, ours: Drawn, theirs: Drawn) -> dict[str, Interval]:
    """Returns the figures of one model minus those of another on the same prompts, each with its 95% interval.

    Both are of the same draws, so that what the prompts have in common cancels.
    Raises InputError where their prompts differ, and where their numbers of pictures do and the figure depends on it.
    """
    if not np.array_equal(ours.prompts, theirs.prompts):
        raise InputError(
            f"{metric.name}: two models are compared on the same prompts; these have {len(ours.prompts)} and "
            f"{len(theirs.prompts)}, of which {len(np.intersect1d(ours.prompts, theirs.prompts))} are the same"
        )
    if metric.interval == "subsample" and ours.pictures != theirs.pictures:
        raise InputError(
            f"{metric.name} depends on the number of pictures: two models are compared at equal numbers, "
            f"not at {ours.pictures} and {theirs.pictures}"
        )

    def minus(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value - other[name] for name, value in one.items() if name in other}

    return _with_intervals(
        metric,
        minus(ours.figures, theirs.figures),
        minus(ours.resampled, theirs.resampled),
        len(ours.prompts),
    )


def _with_intervals(
    metric: Metric, figures: Mapping[str, float], resampled: Mapping[str, np.ndarray], prompts: int
) -> dict[str, Interval]:
    result = {name: Interval(value) for name, value in figures.items()}
    for name in figures.keys() & resampled.keys():
        values = resampled[name]
        # Where a draw has nothing to measure, such as no prompt of several pictures, too few prompts have.
        if np.isfinite(values).all():
            low, high = _bounds(metric, values - values.mean(), prompts)
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
