"""SIGTERM and SIGINT as a request: the step that runs is finished and saved, then the run ends."""

import signal
from types import FrameType

# EX_TEMPFAIL of sysexits.h: run the same command again to go on.
EXIT_PREEMPTED = 75


class Preemption:
    """Notes the first SIGTERM or SIGINT in `requested`; the second has the default effect, at once."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)
