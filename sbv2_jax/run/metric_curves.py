"""Curves of a run's metrics, as SVG pictures."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A curve of more steps is drawn as the mean of as many parts, with their lowest and highest beneath.
_POINTS = 400
_COLOUR, _MARK = "#2563a8", "#c0392b"


def curve(
    name: str, steps: Sequence[int], values: Sequence[float | None], marks: Mapping[str, float]
) -> bytes:
    """Returns the curve of one metric over the steps as SVG; a value that was not finite is None, a gap and a tick.

    `marks` are levels to compare it with, by what they are.
    """
    import matplotlib  # a second to import, and only pages need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = np.asarray(steps, float), np.asarray([np.nan if value is None else value for value in values])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(figsize=(4.6, 2.7), layout="constrained")
        if len(x) > _POINTS:
            parts = [
                part for part in np.array_split(np.arange(len(x)), _POINTS) if np.isfinite(y[part]).any()
            ]
            low, mean, high = (
                [summary(y[part]) for part in parts] for summary in (np.nanmin, np.nanmean, np.nanmax)
            )
            middle = [x[part].mean() for part in parts]
            axes.fill_between(middle, low, high, color=_COLOUR, alpha=0.2, linewidth=0)
            axes.plot(middle, mean, color=_COLOUR, linewidth=1.2)
        else:
            sparse = np.isfinite(y).sum() < 20
            axes.plot(x, y, color=_COLOUR, linewidth=1.2, marker="o" if sparse else None, markersize=3)
        for what, level in marks.items():
            axes.axhline(level, color=_MARK, linewidth=0.8, linestyle="--")
            axes.annotate(what, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
        if len(missing := x[~np.isfinite(y)]):
            axes.plot(missing, np.zeros(len(missing)), "|", color=_MARK, transform=axes.get_xaxis_transform())
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return file.getvalue()


def metrics_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float | None]]]:
    """Returns every metric of `metrics.jsonl` by name: the steps that have it, and its values.

    Losses come first, then what tells a healthy run, then rates, speed and memory.
    """
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    order = ("loss/", "evaluate/", "latents/", "clip/", "reward/", "grad_norm/", "skipped", "lr/")

    def place(name: str) -> int:
        return next((number for number, start in enumerate(order) if name.startswith(start)), len(order))

    return {name: found[name] for name in sorted(found, key=lambda name: (place(name), name))}
