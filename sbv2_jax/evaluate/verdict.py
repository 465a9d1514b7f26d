"""Wins, matches or loses: what the differences of two models say, by a rule that was fixed beforehand."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from sbv2_jax.evaluate.intervals import Interval

_POINT = 0.01
_ROUNDING = 1e-9  # 0.56 - 0.57 is worse by a point, not by more


class Compared(NamedTuple):
    """A figure of a challenger minus that of its rival, one interval for each seed, and what is better of it."""

    differences: Sequence[Interval]
    better: Literal["higher", "lower"]


class Verdict(NamedTuple):
    """The word, and why it is not "wins", a line for each reason."""

    word: Literal["wins", "matches", "loses"]
    reasons: tuple[str, ...]


def verdict(
    decisive: Mapping[str, Compared], guarded: Mapping[str, Compared], *, point: float = _POINT
) -> Verdict:
    """Returns whether a challenger wins against its rival, by the differences of figures, by name.

    It wins if the interval of every decisive figure (such as FD and KID in each extractor) is on the better side of
    0 for every seed, and no guarded figure (such as recall and alignment, shares in 0..1) is worse by more than a
    point for any seed. It loses if something is worse for certain: the interval of a decisive figure is on the
    worse side of 0, or of a guarded one beyond a point, for every seed. Otherwise it matches. Raises ValueError
    where there is nothing to decide by.
    """
    if not decisive or any(not one.differences for one in (*decisive.values(), *guarded.values())):
        raise ValueError("a verdict needs decisive figures, and a difference for each seed of every figure")
    reasons, lost = [], False
    for name, one in decisive.items():
        gains = [_gain(difference, one.better) for difference in one.differences]
        if missed := [gain for gain in gains if gain.low is None or gain.low <= 0]:
            reasons.append(f"{name}: not better for certain in {len(missed)} of {len(gains)} seeds")
        lost |= all(gain.high is not None and gain.high < 0 for gain in gains)
    for name, one in guarded.items():
        gains = [_gain(difference, one.better) for difference in one.differences]
        if missed := [gain for gain in gains if not gain.value >= -point - _ROUNDING]:
            reasons.append(f"{name}: worse by more than {point:g} in {len(missed)} of {len(gains)} seeds")
        lost |= all(gain.high is not None and gain.high < -point for gain in gains)
    return Verdict("loses" if lost else "matches" if reasons else "wins", tuple(reasons))


def _gain(difference: Interval, better: str) -> Interval:
    """Returns a difference of which more is better."""
    if better == "higher":
        return difference
    value, low, high = difference
    return Interval(-value, None if high is None else -high, None if low is None else -low)
