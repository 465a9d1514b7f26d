"""The watchdog: a step that hangs ends the run, and says where it hung."""

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Iterator

from sbv2_jax.devices import processes

# EX_SOFTWARE of sysexits.h: the newest checkpoint is kept, but the machine, or the program, wants looking at.
EXIT_HUNG = 70


@contextlib.contextmanager
def watchdog(step: int, seconds: float) -> Iterator[None]:
    """Ends the process with EXIT_HUNG, and the stacks of its threads on stderr, unless left within `seconds`.

    0 waits for ever. `step` is named in the message. All processes of a run end.
    """
    if seconds == 0:
        yield
        return
    timer = threading.Timer(seconds, _bite, (step, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _bite(step: int, seconds: float) -> None:
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    processes.end(
        EXIT_HUNG,
        f"error: step {step} took longer than config.limits.step_seconds = {seconds:g}: its stacks are above; run "
        "the same command to go on from the newest checkpoint",
    )
