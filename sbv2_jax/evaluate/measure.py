"""From what the networks saw to figures: each source on its own, and each beside the first one."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.evaluate import features
from sbv2_jax.evaluate.features import Networks, Seen
from sbv2_jax.evaluate.intervals import Drawn, Interval, differences, drawn, intervals
from sbv2_jax.evaluate.metrics.metric import Metric
from sbv2_jax.evaluate.protocol import Panel, Protocol, Ways
from sbv2_jax.evaluate.sources import Source
from sbv2_jax.evaluate.verdict import Compared, Verdict, verdict

# Figures by (label of the panel, name).
Figures = dict[tuple[str, str], Interval]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A source by its name and settings, and its figures; `directory` holds the pictures that are shown.

    `rate` is the pictures drawn a second, 0 where all were there; `forwards` is that of the source. Not the source
    itself: it holds a pipeline.
    """

    name: str
    settings: Mapping[str, Any]
    fingerprint: str
    figures: Figures
    directory: Path
    rate: float
    forwards: int | None = None

    @property
    def without_seed(self) -> tuple:
        """What rows that differ by their seed have in common."""
        kept = {name: value for name, value in self.settings.items() if name != "seed"}
        return (self.fingerprint, *sorted(kept.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside its rival, the first one: the differences of figures for each seed that both have."""

    name: str
    rival: str
    seeds: tuple[Any, ...]
    differences: dict[tuple[str, str], list[Interval]]
    verdict: Verdict | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that a report says."""

    protocol: Protocol
    rows: list[Row]
    comparisons: list[Comparison]
    references: dict[str, str]
    """SHA-256 of what was compared with: pictures and networks, by name."""
    better: Ways
    """Which direction of a figure is the better one."""


class Columns:
    """The columns of a panel: of real and of training pictures, and of one source."""

    def __init__(self, protocol: Protocol, networks: Networks, cache: Path):
        self._protocol, self._networks, self._cache = protocol, networks, cache
        self._references: dict[tuple[str, str], np.ndarray] = {}

    def reference(self, label: str, column: str) -> np.ndarray | None:
        pictures = getattr(self._protocol, column)
        if pictures is None or self._networks.panels[label].captions:
            return None
        if (label, column) not in self._references:
            seen = features.of_pictures(self._protocol, self._networks, label, pictures, self._cache)
            self._references[label, column] = seen["features"]
        return self._references[label, column]

    def of(self, panel: Panel, metric: Metric, seen: Seen) -> dict[str, np.ndarray]:
        its = seen[panel.label]
        columns = {"prompts": self._protocol.of, "fake": its.get("features")}
        columns |= {name: its.get(name) for name in ("probabilities", "similarity")}
        for name in {"real", "train"} & {*metric.reads, *metric.takes}:
            columns[name] = self.reference(panel.label, name)
        return {name: column for name, column in columns.items() if column is not None}


def evaluate(protocol: Protocol, sources: Iterable[Source], out: Path, cache: Path) -> Evaluation:
    """Draws the pictures of every source, or reads what was seen of them in `out`, and measures them.

    The sources are asked for one after the other: one pipeline at a time need be in memory.
    What the networks see of real pictures is kept in `cache`.
    Raises InputError as networks, sources and metrics do.
    """
    networks = Networks(protocol.panels)
    columns = Columns(protocol, networks, cache)
    weights = {label: networks[label].fingerprint for label in networks.panels}
    rows: list[Row] = []
    draws: list[list[Drawn]] = []
    for source in sources:
        key = features.digest(
            protocol.fingerprint(), source.fingerprint, dict(source.settings), weights,
            {panel.label: panel.prefix for panel in protocol.panels},
        )  # fmt: skip
        directory = out / "features" / key[:16]
        seen, rate = features.of_source(protocol, networks, source, directory)
        draws.append([drawn(metric, columns.of(panel, metric, seen)) for panel, metric in protocol.metrics()])
        figures = {
            (panel.label, panel.name(name)): interval
            for (panel, metric), its in zip(protocol.metrics(), draws[-1], strict=True)
            for name, interval in intervals(metric, its).items()
        }
        rows.append(
            Row(
                name=source.name,
                settings=source.settings,
                fingerprint=source.fingerprint,
                figures=figures,
                directory=directory,
                rate=rate,
                forwards=source.forwards,
            )
        )
    references = {f"network {label}": weight for label, weight in weights.items()}
    for name in ("real", "train"):
        pictures = getattr(protocol, name)
        if pictures is not None:
            references[f"{name} pictures"] = pictures.fingerprint()
    return Evaluation(
        protocol=protocol,
        rows=rows,
        comparisons=_compared(protocol, rows, draws),
        references=references,
        better=protocol.better(),
    )


def _compared(protocol: Protocol, rows: Sequence[Row], draws: Sequence[Sequence[Drawn]]) -> list[Comparison]:
    """Returns each model beside the first, seed by seed."""
    models: dict[tuple, dict[Any, int]] = defaultdict(dict)
    for index, row in enumerate(rows):
        models[row.without_seed][row.settings.get("seed")] = index
    first, *others = models.values()
    found: list[Comparison] = []
    for other in others:
        # Pictures that are there have no seed: they are compared with each.
        pairs = [
            (ours, its)
            for seed, its in first.items()
            if (ours := other.get(seed, other.get(None))) is not None
        ]
        if None in first:
            pairs = [(index, first[None]) for index in other.values()]
        if not pairs:
            continue
        deltas: dict[tuple[str, str], list[Interval]] = defaultdict(list)
        for number, (panel, metric) in enumerate(protocol.metrics()):
            for ours, its in pairs:
                for name, interval in differences(metric, draws[ours][number], draws[its][number]).items():
                    deltas[panel.label, panel.name(name)].append(interval)
        word = None
        if protocol.decisive:
            decisive, guarded = (
                {
                    " ".join(name): Compared(deltas[name], protocol.way(name))
                    for name in names
                    if name in deltas
                }
                for names in (protocol.decisive, protocol.guarded)
            )
            word = verdict(decisive, guarded)
        found.append(
            Comparison(
                name=rows[pairs[0][0]].name,
                rival=rows[pairs[0][1]].name,
                seeds=tuple(rows[ours].settings.get("seed") for ours, _ in pairs),
                differences=dict(deltas),
                verdict=word,
            )
        )
    return found
