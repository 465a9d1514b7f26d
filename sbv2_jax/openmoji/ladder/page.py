"""The page of the ladder, from what is kept of it: the rule, the teacher, a row for each rung, and what it cost."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sbv2_jax.convert.formats.files import replaced_file
from sbv2_jax.evaluate.intervals import Interval
from sbv2_jax.evaluate.verdict import Compared, Verdict, verdict
from sbv2_jax.openmoji.ladder import page_text, results
from sbv2_jax.openmoji.ladder.climb import Ladder, wanted_of, wanted_of_teacher
from sbv2_jax.openmoji.ladder.curve import draw_curve
from sbv2_jax.openmoji.ladder.rungs import RUNGS, Rung
from sbv2_jax.openmoji.ladder.teacher import Setting, best_row

CURVE = "merge.png"
JUDGES = {"efficientnet-lite0": "Lite0", "efficientnet-lite2": "Lite2"}
# Figures by how they are shown: a factor, and digits after the point.
_SHOWN = {"FD": (1, 1), "KID": (1000, 1), "drawing": (100, 1), "background": (100, 1), "size": (100, 1),
          "place": (100, 1)}  # fmt: skip
_PLAIN = (1, 2)
_HEADS = {"KID": "KID x 1000", "drawing": "drawing, %", "background": "background, %", "size": "size, %",
          "place": "place, %"}  # fmt: skip
_DETAILS = ("precision", "recall", "density", "coverage", "background", "size", "place")
_UNKNOWN = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """What is kept of a rung that counts, seed by seed, and what is kept of another teacher or recipe."""

    rung: Rung
    found: Sequence[Mapping[str, Any]]
    stale: Mapping[int, str]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of all seeds, of the student and of the noise."""
        return [row for one in self.found for row in one["rows"]]

    @property
    def verdict(self) -> Verdict | None:
        """The verdict over all seeds, of the student and of the noise; None where there is none yet."""
        if not self.found:
            return None
        decisive, guarded = (
            {
                f"{label} {figure}": Compared(self.differences(label, figure), way)
                for label, own in self.found[0]["rule"][part].items()
                for figure, way in own.items()
            }
            for part in ("decisive", "guarded")
        )
        return verdict(decisive, guarded)

    def differences(self, label: str, figure: str) -> list[Interval]:
        """Returns the student's figure minus the teacher's, an interval for each seed of both kinds."""
        return [Interval(*values) for one in self.found for values in one["differences"][label][figure]]

    @property
    def said(self) -> str:
        """The verdict in a word or two, or why there is none."""
        if not self.found:
            reasons = dict.fromkeys(self.stale.values())
            return f"stale: {', '.join(reasons)}" if reasons else "not run yet"
        word = self.verdict.word if self.verdict else ""
        seeds = len(self.rung.seeds)
        return word if len(self.found) == seeds else f"{word} so far ({len(self.found)} of {seeds} seeds)"


def standings(ladder: Ladder, teacher: Mapping[str, Any] | None) -> list[Standing]:
    """Returns what is kept of every rung, beside this result of the teacher; without one nothing counts."""
    found = []
    for rung in RUNGS:
        kept = {seed: results.read(ladder.result(rung.name, seed)) for seed in rung.seeds}
        there = {seed: one for seed, one in kept.items() if one}
        wanted = wanted_of(ladder, rung, teacher) if teacher else {}
        stale = {seed: said for seed, one in there.items() if (said := results.stale(one, wanted))}
        counts = [one for seed, one in there.items() if seed not in stale]
        found.append(Standing(rung=rung, found=counts, stale=stale))
    return found


def write_page(ladder: Ladder, path: Path) -> None:
    """Writes the page and, where a merge has been measured, the picture of its curve."""
    wanted, teacher = wanted_of_teacher(ladder), results.read(ladder.teacher)
    if teacher and results.stale(teacher, wanted):
        teacher = None
    every = standings(ladder, teacher)
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = [one for standing in every if standing.rung.curve for one in standing.found if one["curve"]]
    if curves:
        draw_curve([one["curve"] for one in curves], ladder.kept / CURVE)
    with replaced_file(path) as partial:
        partial.write_text(page(ladder, wanted["bundle"], teacher, every), encoding="utf-8")


def page(ladder: Ladder, bundle: str, teacher: Mapping[str, Any] | None, every: Sequence[Standing]) -> str:
    """Returns the page as Markdown."""
    merges = [one for one in every if one.rung.curve]
    parts = [
        page_text.HEAD,
        _summary(every),
        page_text.RULE,
        f"{page_text.TEACHER}\n\nThe bundled pipeline, SHA-256 `{bundle[:16]}`. {_of_teacher(teacher)}",
        page_text.RUNGS.format(count=f"{ladder.count:,}"),
        _table(_quality_head(), [*_quality_of_teacher(teacher), *map(_quality, every)]),
        *_sentences(every),
        page_text.DIFFERENCES,
        _table(_difference_head(), [line for one in every for line in _differences(one)]),
        page_text.DETAILS,
        _table(
            _detail_head(),
            [*_details_of_teacher(teacher), *(line for one in every for line in _details(one))],
        ),
        page_text.MERGE,
        *(_curve(one) for one in merges),
        page_text.COST,
        _table(page_text.COST_HEAD, [line for one in every for line in _cost(one)]),
        page_text.FOOT,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(every: Sequence[Standing]) -> str:
    """Says how far the ladder is climbed, and which rungs win once all their seeds are there."""
    there, all_of_them = sum(len(one.found) for one in every), sum(len(one.rung.seeds) for one in every)
    if not there:
        said = "**Nothing has been run on this teacher yet.**"
    else:
        whole = [one for one in every if len(one.found) == len(one.rung.seeds)]
        won = [f"`{one.rung.name}`" for one in whole if one.verdict and one.verdict.word == "wins"]
        said = f"{there} of {all_of_them} runs are there, {len(whole)} of {len(every)} rungs with all their seeds. "
        said += f"These win: {', '.join(won)}." if won else "**None of those wins against the teacher.**"
    stale = sum(len(one.stale) for one in every)
    return said + (f" {stale} results are stale: they will be run again." if stale else "")


def _of_teacher(teacher: Mapping[str, Any] | None) -> str:
    if teacher is None:
        return "Its best setting has not been measured yet."
    sweep, best = teacher["made_of"]["sweep"], Setting.of(teacher["best"])
    return (
        f"On {sweep['count']:,} validation prompts its best setting was **{best}**: {best.forwards} forwards a picture "
        f"(DDIM and DPM-Solver++; steps {sweep['steps']}; guidance {sweep['guidance']})."
    )


def _sentences(every: Sequence[Standing]) -> Iterator[str]:
    """Yields a line for each rung that is measured, in the words of its verdict."""
    lines = []
    for one in every:
        if one.verdict is None:
            continue
        why = "; ".join(one.verdict.reasons) if one.verdict.reasons else page_text.WON
        lines.append(f"- `{one.rung.name}` {one.said}: {why}.")
    if lines:
        yield page_text.SENTENCES
        yield "\n".join(lines)


def _quality_head() -> list[str]:
    both = [f"{_HEADS.get(figure, figure)}, {name}" for figure in ("FD", "KID") for name in JUDGES.values()]
    return ["rung", "what it is", "the paper's FID", *both, "recall", "drawing, %", "against the teacher"]


def _quality_figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = next(iter(JUDGES))
    names = [(label, figure) for figure in ("FD", "KID") for label in JUDGES]
    return [_mean(rows, *name) for name in (*names, (first, "recall"), (first, "drawing"))]


def _quality(one: Standing) -> list[str]:
    said = f"**{one.said}**" if one.found else one.said
    return [f"`{one.rung.name}`", one.rung.what, one.rung.paper, *_quality_figures(one.rows), said]


def _quality_of_teacher(teacher: Mapping[str, Any] | None) -> Iterator[list[str]]:
    yield ["**teacher**", f"at its best: {_best(teacher)}", "9.64", *_quality_figures(_rows(teacher, 0)), ""]
    if teacher:
        yield ["teacher", "in one step, no guidance", "", *_quality_figures(_rows(teacher, 1)), ""]
        yield ["real pictures", "of the same captions", "", *_quality_figures(_rows(teacher, 2)), ""]


def _best(teacher: Mapping[str, Any] | None) -> str:
    return str(Setting.of(teacher["best"])) if teacher else "not measured yet"


def _rows(teacher: Mapping[str, Any] | None, place: int) -> list[Mapping[str, Any]]:
    """Returns the teacher's rows at its best (0), in one step (1), or those of real pictures (2)."""
    if teacher is None:
        return []
    kinds: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in teacher["rows"]:
        kinds.setdefault((*sorted(_setting(row).items()),), []).append(row)
    best = [row for row in teacher["rows"] if _setting(row) == _setting({"settings": teacher["best"]})]
    others = [rows for rows in kinds.values() if rows[0] not in best]
    drawn = [rows for rows in others if rows[0]["forwards"] is not None]
    real = [rows for rows in others if rows[0]["forwards"] is None]
    return [best, *(drawn or [best]), *real][place]


def _setting(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a row without those that were not set, and without its seed."""
    return {name: value for name, value in row["settings"].items() if name != "seed" and value is not None}


def _difference_head() -> list[str]:
    names = [
        f"{figure}, {name}"
        for figure in ("FD", "KID x 1000", "recall", "drawing, %")
        for name in JUDGES.values()
    ]
    return ["rung", "seeds", *names]


def _differences(one: Standing) -> Iterator[list[str]]:
    if not one.found:
        return
    cells = []
    for figure in ("FD", "KID", "recall", "drawing"):
        factor, digits = _SHOWN.get(figure, _PLAIN)
        for label in JUDGES:
            found = one.differences(label, figure)
            cell = f"{factor * fmean(each.value for each in found):+.{digits}f}"
            low, high = [each.low for each in found], [each.high for each in found]
            if None not in low and None not in high:
                cell += f" [{factor * min(low):+.{digits}f}, {factor * max(high):+.{digits}f}]"  # type: ignore
            cells.append(cell)
    yield [f"`{one.rung.name}`", f"{len(one.found)} x {len(one.found[0]['rows'])}", *cells]


def _detail_head() -> list[str]:
    names = [f"{_HEADS.get(figure, figure)}, {name}" for figure in _DETAILS for name in JUDGES.values()]
    return ["rung", "diversity", *names]


def _detail_figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_mean(rows, label, figure) for figure in _DETAILS for label in JUDGES]


def _details(one: Standing) -> Iterator[list[str]]:
    if one.found:
        diversity = f"{fmean(each['diversity'][0] for each in one.found):.3g}"
        yield [f"`{one.rung.name}`", diversity, *_detail_figures(one.rows)]


def _details_of_teacher(teacher: Mapping[str, Any] | None) -> Iterator[list[str]]:
    if teacher:
        yield ["**teacher**", f"{teacher['diversity'][0]:.3g}", *_detail_figures(_rows(teacher, 0))]


def _curve(one: Standing) -> str:
    curves = {each["seed"]: each["curve"] for each in one.found if each["curve"]}
    if not curves:
        return "Not run yet."
    rule = one.found[0]["rule"]
    best = [f"{best_row(_as_report(curve), rule)['settings']['weight']:g}" for curve in curves.values()]
    first = next(iter(JUDGES))
    weights = [row["settings"]["weight"] for row in next(iter(curves.values()))]
    lines = []
    for place, weight in enumerate(weights):
        rows = [curve[place] for curve in curves.values()]
        figures = ("FD", "KID", "precision", "recall", "drawing")
        lines.append([f"{weight:g}", *(_mean(rows, first, figure) for figure in figures)])
    head = ["lambda", "FD, Lite0", "KID x 1000", "precision", "recall", "drawing, %"]
    said = f"Best by FD and KID with both networks: lambda {', '.join(best)} (seeds {', '.join(map(str, curves))})."
    return f"![figures of the merge over lambda](ladder/{CURVE})\n\n{_table(head, lines)}\n\n{said}"


def _as_report(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows whose figures are as a report has them."""
    return [
        {
            **row,
            "figures": {
                label: {figure: {"value": values[0]} for figure, values in own.items()}
                for label, own in row["figures"].items()
            },
        }
        for row in rows
    ]


def _cost(one: Standing) -> Iterator[list[str]]:
    if not one.found:
        return
    training = [each["training"] for each in one.found]
    forwards = training[0]["forwards"]
    deviations = [each["latents/std"] for each in training if each["latents/std"] is not None]
    drawn = one.found[0]["rows"][0]["forwards"]
    yield [
        f"`{one.rung.name}`",
        f"{forwards['all'] / 1000:,.0f}",
        f"{forwards['teacher'] / 1000:,.0f}",
        f"{fmean(each['minutes'] for each in training):,.0f}",
        f"{fmean(deviations):.2f}" if deviations and not one.rung.merge else _UNKNOWN,
        str(drawn),
        f"{max(each['mib'] for each in training):,.0f}",
        "; ".join(dict.fromkeys(each["machine"] for each in one.found)),
        ", ".join(dict.fromkeys(_short(each["commit"]) for each in one.found)),
    ]


def _short(commit: str | None) -> str:
    """Returns a commit as git has it for short, with its + where the code had been changed."""
    return commit[:7] + "+" * commit.endswith("+") if commit else _UNKNOWN


def _mean(rows: Sequence[Mapping[str, Any]], label: str, figure: str) -> str:
    """Returns the mean of a figure over rows and, in brackets, half of the widest interval."""
    found = [row["figures"][label][figure] for row in rows if figure in row["figures"].get(label, {})]
    if not found:
        return _UNKNOWN
    factor, digits = _SHOWN.get(figure, _PLAIN)
    halves = [(high - low) / 2 for _, low, high in found if low is not None]
    half = f" ({factor * max(halves):.{digits}f})" if halves else ""
    return f"{factor * fmean(value for value, *_ in found):.{digits}f}{half}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "Not run yet."
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
