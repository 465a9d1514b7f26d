"""Two ways of the same work in turns, and what comes of it as lines of JSON."""

import json
import statistics
import time
from collections.abc import Callable, Mapping

from tqdm import trange


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Returns the seconds of each side, called in turns; the first `warm` rounds are not counted.

    A side must return when its work is done, not when it is begun.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in trange(warm + rounds, unit="round"):
        for name in names if number % 2 else names[::-1]:
            begin = time.perf_counter()
            sides[name]()
            if number >= warm:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(figure: str, seconds: Mapping[str, list[float]], images: int, **said: object) -> None:
    """Prints a line of JSON for each side, and one for how many times the images of the last side the first makes."""
    for name, found in seconds.items():
        line = {"seconds": spread(found), "images_per_second": round(images / statistics.median(found), 3)}
        print(json.dumps({"figure": figure, "side": name, **said, **line}), flush=True)
    (first, ours), *_, (last, theirs) = seconds.items()
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    print(
        json.dumps({"figure": figure, "side": f"{first} over {last}", **said, "ratio": spread(ratios)}),
        flush=True,
    )


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median, the lowest and the highest."""
    ordered = sorted(values)
    figures = {"median": statistics.median(ordered), "low": ordered[0], "high": ordered[-1]}
    return {name: round(value, 4) for name, value in figures.items()}
