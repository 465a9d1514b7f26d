"""An evaluation as files: `report.json`, a table for the terminal, and `report.html`, which needs no other file."""

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sbv2_jax.checkpoint.versions import versions
from sbv2_jax.convert.formats.files import replaced_file
from sbv2_jax.evaluate import curves
from sbv2_jax.evaluate.features import shown_path
from sbv2_jax.evaluate.html_page import html_page, html_table, inline
from sbv2_jax.evaluate.intervals import Interval
from sbv2_jax.evaluate.measure import Comparison, Evaluation, Row
from sbv2_jax.evaluate.verdict import Verdict
from sbv2_jax.generate.pictures import grid

_PACKAGES = ("jax", "flax", "numpy", "pillow")
_SHOWN_SIDE = 128  # pixels at least that a picture has in the page's grid


def as_json(evaluation: Evaluation, command: str) -> dict[str, Any]:
    """Returns the report as values; it holds no time of day, so that the same evaluation gives the same bytes."""
    protocol = evaluation.protocol
    return {
        "protocol": protocol.name,
        "pictures": len(protocol.prompts),
        "prompts": len(np.unique(protocol.of)),
        "command": command,
        "versions": versions(*_PACKAGES),
        "references": evaluation.references,
        "not_measured": list(protocol.absent),
        "rule": {
            "decisive": _ways(evaluation, protocol.decisive),
            "guarded": _ways(evaluation, protocol.guarded),
        },
        "sources": [
            {
                "name": row.name,
                "settings": dict(row.settings),
                "sha256": row.fingerprint,
                "forwards": row.forwards,
                "figures": _nested(row.figures),
            }
            for row in evaluation.rows
        ],
        "comparisons": [
            {
                "name": one.name,
                "rival": one.rival,
                "seeds": list(one.seeds),
                "differences": _nested(one.differences),
                "verdict": one.verdict and one.verdict._asdict(),
            }
            for one in evaluation.comparisons
        ],
    }


def write(evaluation: Evaluation, command: str, out: Path) -> None:
    """Writes `report.json`, `report.html`, and the curves of a sweep as PNG files in `curves/`."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = curves.draw(evaluation)
    for name, picture in drawn.items():
        (out / "curves").mkdir(exist_ok=True)
        with replaced_file(out / "curves" / f"{name}.png") as partial:
            partial.write_bytes(picture)
    text = json.dumps(as_json(evaluation, command), indent=2) + "\n"
    for name, content in (("report.json", text), ("report.html", page(evaluation, command, drawn))):
        with replaced_file(out / name) as partial:
            partial.write_text(content, encoding="utf-8")


def table(evaluation: Evaluation) -> str:
    """Returns the figures as lines for a terminal, a block for each network: a row for each source, and half the width
    of its interval."""
    lines = []
    for label in dict.fromkeys(label for label, _ in _names(evaluation.rows)):
        names = [name for name in _names(evaluation.rows) if name[0] == label]
        cells = [[label, *(figure for _, figure in names)]]
        for row in evaluation.rows:
            cells.append([_title(row), *(_short(row.figures.get(name)) for name in names)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            first, *others = (
                (str.rjust if place else str.ljust)(cell, width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            lines.append("  ".join((first, *others)))
        lines.append("")
    lines += [f"not measured: {line}" for line in evaluation.protocol.absent]
    lines += [_sentence(one, one.verdict) for one in evaluation.comparisons if one.verdict]
    return "\n".join(lines)


def page(evaluation: Evaluation, command: str, drawn: dict[str, bytes]) -> str:
    """Returns the report as one HTML page that needs no other file."""
    protocol = evaluation.protocol
    parts = [
        f"<h1>{html.escape(protocol.name)}</h1>",
        f"<p>{len(protocol.prompts):,} pictures of {len(np.unique(protocol.of)):,} prompts for each row. In brackets: "
        "95 % intervals over prompts. The best of each column is bold.</p>",
    ]
    for label in dict.fromkeys(label for label, _ in _names(evaluation.rows)):
        parts += [f"<h2>{html.escape(label)}</h2>", _html_table(evaluation, label)]
    parts += [f"<p>Not measured: {html.escape(line)}.</p>" for line in protocol.absent]
    if (sheet := _grid(evaluation)) is not None:
        parts += [
            "<h2>Pictures</h2>",
            f'<div class="scroll"><img alt="the same prompts, a column a model" src="{_inline(sheet)}"></div>',
        ]
    if drawn:
        parts.append("<h2>Curves</h2>")
        parts += [
            f'<img alt="{name}" src="{inline(picture, "image/png")}">' for name, picture in drawn.items()
        ]
    if evaluation.comparisons:
        parts.append("<h2>Against the first row</h2>")
        parts += [_html_comparison(one) for one in evaluation.comparisons]
    hashes = html_table(
        (html.escape(name), f"<code>{value}</code>") for name, value in evaluation.references.items()
    )
    made = ", ".join(f"{name} {version}" for name, version in versions(*_PACKAGES).items())
    parts.append(
        f"<h2>How it was made</h2><pre>{html.escape(command)}</pre><p>{html.escape(made)}</p>{hashes}"
    )
    return html_page(protocol.name, parts)


def _names(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(name for row in rows for name in row.figures))


def _nested(figures: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for (label, name), value in figures.items():
        said = value._asdict() if isinstance(value, Interval) else [one._asdict() for one in value]
        nested.setdefault(label, {})[name] = said
    return nested


def _ways(evaluation: Evaluation, names: Sequence[tuple[str, str]]) -> dict[str, dict[str, str | None]]:
    """Returns which direction of each of these figures, where it is measured, is the better one."""
    ways: dict[str, dict[str, str | None]] = {}
    for label, figure in (name for name in names if name in evaluation.better):
        ways.setdefault(label, {})[figure] = evaluation.better[label, figure]
    return ways


def _title(row: Row) -> str:
    seed = row.settings.get("seed")
    return row.name + ("" if seed is None else f", seed {seed}")


def _short(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    half = (
        "" if interval.low is None or interval.high is None else f" ±{(interval.high - interval.low) / 2:.2g}"
    )
    return f"{interval.value:.4g}{half}"


def _text(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.low is None:
        return f"{interval.value:.4g}"
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _sentence(one: Comparison, found: Verdict) -> str:
    why = f" ({'; '.join(found.reasons)})" if found.reasons else ""
    return f"{one.name} {found.word} against {one.rival}{why}"


def _html_table(evaluation: Evaluation, label: str) -> str:
    names = [name for name in _names(evaluation.rows) if name[0] == label]
    head = ("", *(html.escape(figure) for _, figure in names))
    best = {}
    for name in names:
        values = [row.figures[name].value for row in evaluation.rows if name in row.figures]
        if evaluation.better.get(name) and len(set(values)) > 1:
            best[name] = (max if evaluation.better[name] == "higher" else min)(values)
    lines = []
    for row in evaluation.rows:
        cells = [html.escape(_title(row))]
        for name in names:
            interval = row.figures.get(name)
            if interval is None:
                cells.append("-")
                continue
            cell = f"{interval.value:.4g}"
            if best.get(name) == interval.value:
                cell = f'<span class="best">{cell}</span>'
            if interval.low is not None:
                cell += f"<br><small>[{interval.low:.4g}, {interval.high:.4g}]</small>"
            cells.append(cell)
        lines.append(cells)
    return html_table(lines, head)


def _html_comparison(one: Comparison) -> str:
    # What does not depend on the pictures is the same, and has no interval.
    rows = (
        (html.escape(" ".join(name)), *map(_text, deltas))
        for name, deltas in one.differences.items()
        if any(interval.low is not None for interval in deltas)
    )
    head = ("difference", *("" if seed is None else f"seed {seed}" for seed in one.seeds))
    said = _sentence(one, one.verdict) if one.verdict else f"{one.name} minus {one.rival}"
    return f"<details><summary>{html.escape(said)}</summary>{html_table(rows, head)}</details>"


def _grid(evaluation: Evaluation) -> np.ndarray | None:
    """Returns the first pictures of every source side by side, those of one seed where there are several."""
    shown: dict[tuple, Row] = {}
    for row in evaluation.rows:
        shown.setdefault(row.without_seed, row)
    protocol, columns = evaluation.protocol, {}
    for row in shown.values():
        paths = [
            path
            for index in range(len(protocol.prompts))
            if (path := shown_path(row.directory, index)).exists()
        ]
        columns[row.name] = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    if len({pictures.shape for pictures in columns.values()}) != 1:
        return None
    side = next(iter(columns.values())).shape[1]
    return grid(
        columns, protocol.prompts[: len(next(iter(columns.values())))], scale=max(1, _SHOWN_SIDE // side)
    )


def _inline(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return inline(file.getvalue(), "image/png")
