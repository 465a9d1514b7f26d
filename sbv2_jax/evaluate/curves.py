"""Curves of a sweep: quality against alignment, precision against recall, and figures over the weight of a merge."""

import io
from collections import defaultdict

from sbv2_jax.evaluate.measure import Evaluation, Row

# What is drawn against what, by the figure's name; the x axis first. CLIP scores go with all, others with their own.
_PAIRS = (("CLIP score", ("FID", "FD")), ("drawing", ("FD",)), ("recall", ("precision",)))
_SWEPT = ("weight", "guidance")  # a merge has both


def draw(evaluation: Evaluation) -> dict[str, bytes]:
    """Returns the curves that an evaluation has, PNG by name; none without three points of one sweep at least.

    A line joins the points of one model, steps and seed in the order of the guidance, or of the weight of a merge.
    """
    lines: dict[tuple, list[Row]] = defaultdict(list)
    for row in evaluation.rows:
        if swept := next((name for name in _SWEPT if name in row.settings), None):
            kept = {name: value for name, value in row.settings.items() if name != swept}
            lines[swept, *sorted((name, str(value)) for name, value in kept.items())].append(row)
    lines = {key: rows for key, rows in lines.items() if len(rows) > 2}
    if not lines:
        return {}
    names = list(dict.fromkeys(name for rows in lines.values() for row in rows for name in row.figures))
    pictures = {}
    for horizontal, verticals in _PAIRS:
        for x in (name for name in names if name[1] == horizontal):
            for y in (name for name in names if name[1] in verticals):
                if y[0] != x[0] and horizontal != "CLIP score":
                    continue
                pictures[_file(f"{y[0]} {y[1]} against {x[0]} {x[1]}")] = _figure(lines, x, y)
    if any(key[0] == "weight" for key in lines):
        of_merges = {key: rows for key, rows in lines.items() if key[0] == "weight"}
        for y in names:
            pictures[_file(f"{y[0]} {y[1]} over the weight")] = _figure(of_merges, None, y)
    return pictures


def _file(text: str) -> str:
    return "".join(one if one.isalnum() else "_" for one in text).strip("_").lower()


def _figure(lines: dict[tuple, list[Row]], x: tuple[str, str] | None, y: tuple[str, str]) -> bytes:
    import matplotlib  # a second to import, and only sweeps need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    for key, rows in lines.items():
        rows = sorted(rows, key=lambda row: row.settings[key[0]])
        points = [
            (row.figures[x].value if x else row.settings["weight"], row.figures[y].value, row)
            for row in rows
            if y in row.figures and (x is None or x in row.figures)
        ]
        label = ", ".join(value if name == "model" else f"{name} {value}" for name, value in key[1:])
        axes.plot([one[0] for one in points], [one[1] for one in points], marker="o", label=label)
        for across, up, row in points if x else ():
            axes.annotate(
                f"{row.settings[key[0]]:g}", (across, up), xytext=(4, 4), textcoords="offset points"
            )
    axes.set_xlabel(" ".join(x) if x else "weight of the first model")
    axes.set_ylabel(" ".join(y))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return file.getvalue()
