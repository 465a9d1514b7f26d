"""The picture of a merge's figures over the weight of its first training, as the paper's figure 7."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sbv2_jax.convert.formats.files import replaced_file

_FIGURES = ("FD", "KID", "precision", "recall", "drawing")


def draw_curve(curves: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws the figures of merges, a curve for each network: the mean over seeds, whose own are thin lines.

    Each of `curves` has the rows of one seed, in the order of the weight.
    """
    import matplotlib  # a second to import, and only this needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(
        1, len(_FIGURES), figsize=(3 * len(_FIGURES), 3), dpi=100, layout="constrained"
    )
    weights = [row["settings"]["weight"] for row in curves[0]]
    for axes, name in zip(every, _FIGURES, strict=True):
        for place, label in enumerate(curves[0][0]["figures"]):
            lines = [[row["figures"][label][name][0] for row in curve] for curve in curves]
            mean = [fmean(values) for values in zip(*lines, strict=True)]
            axes.plot(weights, mean, marker="o", markersize=3, color=f"C{place}", label=label)
            for line in lines if len(lines) > 1 else ():
                axes.plot(weights, line, color=f"C{place}", linewidth=0.6, alpha=0.5)
        axes.set_title(name)
        axes.set_xlabel("lambda: weight of the full training")
        axes.grid(alpha=0.3)
    every[0].legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial:
        partial.write_bytes(file.getvalue())
