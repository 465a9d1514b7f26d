"""Intervals of one model and of two, from columns: each drawn, then looked at."""

from sbv2_jax.evaluate.intervals import Interval, differences, drawn, intervals


def intervals_of(metric, columns, **settings) -> dict[str, Interval]:
    return intervals(metric, drawn(metric, columns, **settings))


def differences_of(metric, columns, others, **settings) -> dict[str, Interval]:
    return differences(metric, *(drawn(metric, one, **settings) for one in (columns, others)))
