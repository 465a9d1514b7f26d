"""The record of a run's steps while they run: metrics are read late, so that the devices never wait for the host."""

import time
from collections.abc import Mapping

import jax

from sbv2_jax.run.guard import Guard
from sbv2_jax.run.health import Health
from sbv2_jax.run.log import MetricsLog


class Record:
    """Holds the metrics of the step that was started last, until they are read, logged and guarded.

    `start` a step, then `read` and `write` it, or `catch_up` for both, before the next one is started here.
    """

    def __init__(self, log: MetricsLog, guard: Guard, health: Health):
        self._log, self._guard, self._health = log, guard, health
        self._running: tuple[int, Mapping[str, jax.Array], float] | None = None
        self._read: tuple[int, dict[str, float]] | None = None
        self._end = 0.0

    def start(self, step: int, metrics: Mapping[str, jax.Array], begin: float) -> None:
        """Notes a step that the devices were given at the time `begin`."""
        self._running = (step, metrics, begin)

    def read(self) -> None:
        """Waits for the step that was started, if any, and notes how long the devices took for it."""
        if self._running is None:
            return
        step, metrics, begin = self._running
        self._running, found = None, jax.device_get(dict(metrics))
        before, self._end = self._end, time.monotonic()
        # It was given to them while the one before ran, or behind a save.
        seconds = self._end - max(begin, before)
        self._read = (step, found | self._health.metrics(step, seconds, skipped=bool(found["skipped"])))

    def write(self, figures: Mapping[str, float] | None = None) -> None:
        """Logs the step that was read, with `figures` beside its metrics, and asks the guard.

        Raises InputError where it cannot be written, and as `Guard` does.
        """
        if self._read is None:
            return
        (step, metrics), self._read = self._read, None
        self._log.write(step, metrics | dict(figures or {}), self._end)
        self._guard.check(step, metrics)

    def catch_up(self) -> None:
        """Reads and writes the step that was started, if it is not written yet."""
        self.read()
        self.write()
