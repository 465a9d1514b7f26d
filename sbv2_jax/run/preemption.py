"""SIGTERM and SIGINT as a request: what the devices were given is finished and saved, then the run ends.

Before the first step there is nothing to save, and the run ends at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from sbv2_jax.devices import processes

# EX_TEMPFAIL of sysexits.h: run the same command again to go on.
EXIT_PREEMPTED = 75
AGAIN = "run the same command to go on"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(SystemExit):
    """Ends the process with EXIT_PREEMPTED where it is not caught; `message` is for who catches it."""

    def __init__(self, step: int, of: str):
        self.message = f"stopped after step {step} of {of}, which is saved: {AGAIN}"
        super().__init__(EXIT_PREEMPTED)


class Preemption:
    """Notes the first SIGTERM or SIGINT; the second has the default effect, at once.

    Of several processes one signal, noted by JAX, is enough: all stop after the same step.
    """

    def __init__(self):
        self._requested = False
        self._before = {}
        self._asked = 0
        self._wakeup = -1

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        else:  # SIGTERM is JAX's
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, _as_sigterm)}
        self._wakeup = signal.set_wakeup_fd(-1)  # of `ends_at_once` around it
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
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def ends_at_once(when: str = "before the first step") -> Iterator[None]:
    """Has SIGTERM and SIGINT end the run at once, whatever it does, with one line and EXIT_PREEMPTED.

    For what comes before the first step, or beside the steps, which are within a `Preemption`; `when` is for the
    line. Of several processes SIGINT to one ends all; SIGTERM, which JAX has for its own, waits for that step there.
    """
    numbers = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
    read, write = os.pipe()
    os.set_blocking(write, False)
    # The main thread may be inside the compiler for minutes, where Python calls no handler; the number is written
    # all the same, and another thread reads it.
    before = {number: signal.signal(number, _nothing) for number in numbers}
    wakeup = signal.set_wakeup_fd(write)
    reader = threading.Thread(target=_end_at, args=(read, when), name="signals", daemon=True)
    reader.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        reader.join()
        os.close(read)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Stands for Python's own handler, which would raise at some later time."""


def _end_at(pipe: int, when: str) -> None:
    while received := os.read(pipe, 1):
        if received[0] in _SIGNALS:
            name = signal.Signals(received[0]).name
            processes.end(EXIT_PREEMPTED, f"stopped by {name} {when}: nothing is lost, {AGAIN}")
