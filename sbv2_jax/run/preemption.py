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
        self._asked = 0

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def requested(self) -> bool:
        """Returns whether the run is to stop here; every process asks once after every step."""
        if jax.process_count() > 1 and not self._requested:
            # Not the run's step: XLA stops all at the count after the largest that it was told, which is 0 before
            # the first, and a resumed run would never be at 1.
            self._asked += 1
            self._requested = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._requested

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)
