"""The rule of "wins", "matches" and "loses", case by case."""

import numpy as np
import pytest

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.intervals import Interval
from sbv2_jax.evaluate.metrics.inception_score import InceptionScore
from sbv2_jax.evaluate.protocol import Panel, Protocol
from sbv2_jax.evaluate.verdict import Compared, verdict


def falls(*intervals):
    return Compared([Interval(*one) for one in intervals], "lower")


def rises(*intervals):
    return Compared([Interval(*one) for one in intervals], "higher")


BETTER = falls((-5, -7, -3), (-4, -6, -2))
WON = {"FD, Lite0": BETTER, "KID, Lite0": BETTER}
FINE = {"recall": rises((-0.01, -0.03, 0.02), (0.02, -0.01, 0.05))}


def uncertain(name, seeds):
    return (f"{name}: not better for certain in {seeds} seeds",)


def worse(seeds):
    return (f"recall: worse by more than 0.01 in {seeds} seeds",)


CASES = {
    "all better": (WON, FINE, "wins", ()),
    "worse by a point and a rounding": (WON, {"recall": rises((0.56 - 0.57, -1, 1))}, "wins", ()),
    "more is better": ({"IS": rises((5, 3, 7))}, {}, "wins", ()),
    "one seed is not certain": (
        WON | {"FD, Lite2": falls((-5, -7, -3), (-1, -3, 1))},
        FINE,
        "matches",
        uncertain("FD, Lite2", "1 of 2"),
    ),
    "an interval that ends at 0": ({"FD": falls((-1, -2, 0))}, {}, "matches", uncertain("FD", "1 of 1")),
    "no interval": ({"FD": falls((-1, None, None))}, {}, "matches", uncertain("FD", "1 of 1")),
    "not a number": (
        WON,
        {"recall": rises((float("nan"), None, None))},
        "matches",
        worse("1 of 1"),
    ),
    "one seed's recall is worse": (
        WON,
        {"recall": rises((-0.02, -0.03, 0.0), (0.1, 0, 0.2))},
        "matches",
        worse("1 of 2"),
    ),
    "recall is worse for certain": (
        WON,
        {"recall": rises((-0.05, -0.06, -0.04))},
        "loses",
        worse("1 of 1"),
    ),
    "one distance is better and one worse for certain": (
        WON | {"KID, Lite2": falls((5, 3, 7), (5, 3, 7))},
        FINE,
        "loses",
        uncertain("KID, Lite2", "2 of 2"),
    ),
    "worse in one seed, undecided in the other": (
        {"FD": falls((5, 3, 7), (1, -1, 3))},
        {},
        "matches",
        uncertain("FD", "2 of 2"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_follows_from_the_intervals(case):
    decisive, guarded, word, reasons = CASES[case]
    assert verdict(decisive, guarded) == (word, reasons)


def test_nothing_to_decide_by_is_an_error():
    for decisive, guarded in (({}, FINE), ({"FD": falls()}, {}), (WON, {"recall": rises()})):
        with pytest.raises(ValueError, match="needs decisive figures"):
            verdict(decisive, guarded)


def test_a_figure_of_which_neither_more_nor_less_is_better_cannot_decide():
    def protocol(figure):
        return Protocol(
            name="p",
            prompts=["a", "b"],
            of=np.arange(2),
            panels=(Panel(label="net", open=lambda: None, metrics=(InceptionScore(),)),),
            prepare=lambda picture: picture,
            prepared="as they are",
            decisive=(("net", figure), ("not measured", "FID")),
        )

    with pytest.raises(InputError, match="net inception_score_deviation cannot decide"):
        protocol("inception_score_deviation")
    assert protocol("inception_score").way(("net", "inception_score")) == "higher"
