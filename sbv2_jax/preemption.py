"""SIGTERM and SIGINT as a request: the step that runs is finished and saved, then the run ends."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: run the same command again to go on.
EXIT_PREEMPTED = 75


class Preemption:
    """Notes the first SIGTERM or SIGINT; the second has the default effect, at once.

    Of several processes one SIGTERM, noted by JAX, is enough: all stop after the same step.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self._requested = False
        self._before = {}

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def after(self, step: int) -> bool:
        """Returns whether the run is to stop after this step; every process asks after every step."""
        if jax.process_count() > 1:
            self._requested = self._requested or multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)
