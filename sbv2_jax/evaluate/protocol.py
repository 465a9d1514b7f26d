"""A protocol: which prompts are drawn, what the pictures are compared with, and by which metrics of which networks."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics.metric import Metric, Way
from sbv2_jax.evaluate.pictures import Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """The metrics that are measured with one network.

    `open` loads the network: an `Extractor`, or with `captions` an `ImageText`, which sees a
    picture beside its caption. `prefix` stands before each caption. `names` gives figures the name that they have
    with this network, such as {"frechet": "FID"}.
    """

    label: str
    open: Callable[[], Any]
    metrics: tuple[Metric, ...]
    captions: bool = False
    prefix: str = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def name(self, figure: str) -> str:
        """Returns what a figure of a metric is called in a report."""
        return self.names.get(figure, figure)


# Which direction of a figure, (label of the panel, name), is the better one.
Ways = dict[tuple[str, str], Way | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Protocol:
    """How pictures are measured, everything but the pictures.

    `prompts` has one for each picture, and `of` int [N] which prompt, by number, each is; `prepare` is done to every
    picture, generated or real, before a network sees it. `real` is what they are compared with, and `train` what
    a copy would be a copy of. `decisive` and `guarded` are the figures, (label of the panel, name of the figure), of
    the rule by which one model wins against another (`verdict.verdict`). `absent` says what is not measured, and why.
    Raises InputError for a figure of that rule of which neither more nor less is better.
    """

    name: str
    prompts: Sequence[str]
    of: np.ndarray
    panels: tuple[Panel, ...]
    prepare: Callable[[np.ndarray], np.ndarray]
    prepared: str
    """What `prepare` does, in a word: part of the fingerprint."""
    real: Pictures | None = None
    train: Pictures | None = None
    decisive: tuple[tuple[str, str], ...] = ()
    guarded: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        measured = self.better()
        for name in (*self.decisive, *self.guarded):
            if name in measured:
                self.way(name)

    def fingerprint(self) -> str:
        """Returns what the generated pictures and their features depend on, beside the model: a SHA-256."""
        facts = [self.name, list(self.prompts), self.of.tolist(), self.prepared]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def metrics(self) -> Iterator[tuple[Panel, Metric]]:
        """Yields every metric with its panel."""
        for panel in self.panels:
            for metric in panel.metrics:
                yield panel, metric

    def better(self) -> Ways:
        """Returns which direction of each figure is the better one, by (label of the panel, name)."""
        return {
            (panel.label, panel.name(figure)): better
            for panel, metric in self.metrics()
            for figure, better in metric.better.items()
        }

    def way(self, name: tuple[str, str]) -> Way:
        """Returns which direction of a figure is the better one; raises InputError where neither is."""
        found = self.better()[name]
        if found is None:
            raise InputError(f"{' '.join(name)} cannot decide: neither more nor less of it is better")
        return found
