"""Figures of a run's student while it trains: a protocol's, of pictures drawn on the run's own mesh."""

import inspect
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from sbv2_jax.distill.state import TrainState
from sbv2_jax.errors import InputError, listed
from sbv2_jax.evaluate.features import PIECE, Networks, whole
from sbv2_jax.evaluate.measure import Columns
from sbv2_jax.evaluate.protocol import Protocol
from sbv2_jax.fields import imported
from sbv2_jax.run.painter import Painter

# In metrics.jsonl a figure is `evaluate/LABEL/NAME`.
_PREFIX = "evaluate"


class Measured(NamedTuple):
    """A protocol with its networks, and by which of its figures the best step is chosen, (name in the log, better
    direction) or None."""

    protocol: Protocol
    networks: Networks
    best: tuple[str, str] | None


class Scoring:
    """Measures the student's pictures by a protocol.

    Nothing is held twice: the pictures are drawn from the run's own networks, piece by piece. What real pictures look
    like to the protocol's networks is kept in `cache`. `best` is that of `Measured`.
    """

    def __init__(self, measured: Measured, seed: int, painter: Painter, cache: Path):
        self._protocol, self._networks, self.best = measured
        self._seed, self._painter = seed, painter
        self._columns = Columns(self._protocol, self._networks, cache)

    def measure(self, state: TrainState) -> dict[str, float]:
        """Returns the figures of the student, averaged where the run keeps an average, in every process."""
        protocol, weights, pieces = self._protocol, self._painter.student(state), []
        for start in range(0, len(protocol.prompts), PIECE):
            rows = range(start, min(start + PIECE, len(protocol.prompts)))
            texts = [protocol.prompts[row] for row in rows]
            drawn = self._painter.draw_student(weights, texts, self._seed, rows)
            pictures = [protocol.prepare(picture) for picture in drawn]
            pieces.append(
                {label: self._networks.see(label, pictures, texts) for label in self._networks.panels}
            )
        seen = whole(pieces)
        return {
            f"{_PREFIX}/{panel.label}/{panel.name(name)}": value
            for panel, metric in protocol.metrics()
            for name, value in metric.measure(**metric.columns(self._columns.of(panel, metric, seen))).items()
        }


def open_protocol(config: ConfigDict) -> Measured:
    """Opens the protocol of `config.evaluate` and its networks: what is missing is missed before the first step.

    Raises InputError where one of them cannot be had, and for a `best` that is none of its figures.
    """
    values = config.evaluate
    make = imported(values.protocol, "config.evaluate.protocol")
    if not callable(make) or "count" not in inspect.signature(make).parameters:
        raise InputError(
            f"config.evaluate.protocol: {values.protocol} is no function of count= that returns a Protocol"
        )
    protocol = make(count=values.count)
    best = _best(protocol, values.best) if values.best else None
    return Measured(protocol, Networks(protocol.panels), best)


def _best(protocol: Protocol, name: str) -> tuple[str, str]:
    better = {
        f"{_PREFIX}/{label}/{name}": direction
        for (label, name), direction in protocol.better().items()
        if direction is not None
    }
    if name not in better:
        raise InputError(f"config.evaluate.best = {name!r} is none of {listed(list(better), ', ')}")
    return name, better[name]
