"""The commands of the ladder as processes of their own, one after the other."""

import shlex
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

from sbv2_jax.run.preemption import EXIT_PREEMPTED


class Failed(Exception):
    """Ends a rung whose command has ended with another exit code than 0."""

    def __init__(self, command: Sequence[str], code: int):
        super().__init__(f"exit code {code} of: {shlex.join(command)}")


class Stopped(SystemExit):
    """Ends the ladder after a signal, when the command that ran has saved what it had."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Processes:
    """Runs commands, each once; with `dry_run` it only prints them."""

    def __init__(self, *, dry_run: bool = False):
        self.dry_run = dry_run
        self._codes: dict[tuple[str, ...], int] = {}

    def run(self, command: Sequence[str]) -> None:
        """Runs a command that has not run yet; raises Failed where it fails, or has, and Stopped after a signal."""
        key = tuple(command)
        if key not in self._codes:
            print(shlex.join(command), flush=True)
            self._codes[key] = 0 if self.dry_run else _exit_code(command)
        if self._codes[key]:
            raise Failed(command, self._codes[key])


def _exit_code(command: Sequence[str]) -> int:
    """Returns the exit code of a command; a signal to end is passed on to it, which may save before it ends."""
    # In a group of its own: from the terminal Ctrl-C would reach it twice, and the second one ends it at once.
    process = subprocess.Popen(command, process_group=0)
    received = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    ends = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        ends.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in ends}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received or code == EXIT_PREEMPTED:  # the signal may have reached the command alone
        raise Stopped
    return code
