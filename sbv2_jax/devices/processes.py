"""The processes of one run, each on a machine or a part of one: joined at the start, agreed on every failure."""

import contextlib
import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

# JAX has no public way to the service by which its processes find each other; Orbax takes this one too.
from jax._src import distributed
from jax.experimental import multihost_utils

from sbv2_jax.errors import InputError

_MESSAGE_BYTES = 1000
# What the launchers that JAX can read set for each process of several.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Where a process that fails says so: the exit code and one line, under its number.
_FAILED = "sbv2_jax/failed/"
# Where a process says, with its last breath, that it needs the service of process 0 no longer.
_GONE = "sbv2_jax/gone/"
_POLL_SECONDS = 0.25
# So long a process may take to fail by itself of what failed another, before it is ended.
_GRACE_SECONDS = 3.0
# So long process 0 waits beyond that for the others to go: on a busy machine they learn late.
_FAREWELL_SECONDS = 10.0
# Set where all processes raise what one has met: each then closes what it holds, in its own time.
_agreed = threading.Event()


def join(coordinator: str | None, count: int | None, index: int | None, *, pod: bool = False) -> bool:
    """Joins this process to the others of a run, and returns whether there are any; one alone is left as it is.

    Args:
      coordinator: HOST:PORT of process 0.
      count: how many processes there are.
      index: which of them this is.
      pod: the three are found by JAX itself: from a TPU's metadata, SLURM, MPI or Kubernetes.

    With none of the four, a SLURM step or an MPI run of several tasks is still noticed. Process 0 prints how many
    processes and devices there are: under SLURM and Open MPI JAX gives a process one GPU, however few there are.
    Raises InputError for flags that do not go together, and where the processes do not find each other.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [flag for flag, value in given.items() if value is None]
    launched = any(int(os.environ.get(name, "1")) > 1 for name in _COUNTS)
    if len(missing) == len(given) and not (pod or launched):
        return False
    if missing and len(missing) < len(given):
        raise InputError(f"{', '.join(sorted(given.keys() - set(missing)))} also needs {', '.join(missing)}")
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"--process_id={index} is not below --num_processes={count}")
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of the run did not find each other: {error}") from error
    several = jax.process_count() > 1
    if several and jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)
    return several


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Has what is wrong for any process raised by all: else the others would wait for one that has ended."""
    message, own = "", None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the others must not wait)
        message, own = str(error) or type(error).__name__, error
    if jax.process_count() > 1:
        messages = _shared(message)
        failed = [number for number, each in enumerate(messages) if each]
        if failed:
            _agreed.set()
        if failed and own is None:
            raise InputError(f"process {failed[0]}: {messages[failed[0]]}")
    if own is not None:
        raise own


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes within seconds of an error that one of them alone meets, wherever the others are.

    The others print it as `error: process N: ...` and exit with its code: 2 where the input or the system is to
    blame, else 1. What all raise, as by `together`, each is left to end by itself.
    """
    if jax.process_count() == 1:
        yield
        return
    finished = threading.Event()
    said: dict[int, str] = {}
    _agreed.clear()
    threading.Thread(target=_watch, args=(finished, said), name="others", daemon=True).start()
    try:
        yield
    except BaseException as error:
        expected = isinstance(error, InputError | OSError)
        if not expected and said | _said(distributed.global_state.client, _FAILED):
            time.sleep(
                2 * _GRACE_SECONDS
            )  # what JAX makes of a peer that has gone says less: the thread says more
        # The thread goes on: an error is no end yet, for a saver or JAX's own farewell may wait for the others.
        said[jax.process_index()] = _tell(2 if expected else 1, str(error) or type(error).__name__)
        raise
    finished.set()


def end(code: int, message: str) -> NoReturn:
    """Prints a line on stderr and ends this process at once with an exit code, and so all others of the run.

    Nothing is waited for and nothing written: to be called from any thread, whatever the others of it do.
    """
    print(message, file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        _tell(code, message)
        _leave(*_place(), _GRACE_SECONDS + _FAREWELL_SECONDS)
    os._exit(code)


def _tell(code: int, message: str) -> str:
    """Says to all processes how this one fails, and returns it."""
    said = f"{code} {' '.join(message.split())[:_MESSAGE_BYTES]}"
    client, own, _ = _place()
    _set(client, f"{_FAILED}{own}", said)
    return said


def _place() -> tuple[Any, int, int]:
    """Returns JAX's service, this process's number, and how many there are: gone, all of it, after JAX's farewell."""
    return distributed.global_state.client, jax.process_index(), jax.process_count()


def _leave(client: Any, own: int, count: int, patience: float) -> None:
    """Says that this process ends; process 0 waits first for the others, since with it ends JAX's service.

    A process that still asks that service when it goes is aborted by JAX, with a code that is nobody's.
    """
    if own != 0:
        _set(client, f"{_GONE}{own}", "gone")
        return
    deadline = time.monotonic() + patience
    while len(_said(client, _GONE)) < count - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    time.sleep(_POLL_SECONDS)  # between its last word and its end


def _set(client: Any, key: str, text: str) -> None:
    """Says something to all processes."""
    with contextlib.suppress(Exception):  # the service may be what has failed
        client.key_value_set(key, text, allow_overwrite=True)


def _said(client: Any, directory: str) -> dict[int, str]:
    """Returns what the processes have said there, by their numbers."""
    with contextlib.suppress(Exception):
        return {int(key.rpartition("/")[2]): line for key, line in client.key_value_dir_get(directory)}
    return {}


def _watch(finished: threading.Event, said: dict[int, str]) -> None:
    """Waits for the first process that says that it fails, and ends this one as that, unless all do.

    `said` is what is known without the service, which JAX's farewell takes away.
    """
    client, own, count = _place()
    while not said:
        said |= _said(client, _FAILED)
        if finished.wait(_POLL_SECONDS):
            return
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        said |= _said(client, _FAILED)
        if len(said) == count or _agreed.is_set() or finished.wait(_POLL_SECONDS):
            return
    first = own if own in said else min(said)
    code, _, line = said[first].partition(" ")
    if first != own:
        print(f"error: process {first}: {line}", file=sys.stderr, flush=True)
    _leave(client, own, count, _FAREWELL_SECONDS)
    os._exit(int(code))


def require_same(name: str, value: str) -> None:
    """Raises InputError, in every process, unless all have the same value."""
    if jax.process_count() == 1:
        return
    digests = _shared(hashlib.sha256(value.encode()).hexdigest())
    others = [str(number) for number, each in enumerate(digests) if each != digests[0]]
    if others:
        raise InputError(f"{name} of process(es) {', '.join(others)} is not that of process 0")


def told_by_the_first(answer: bool) -> bool:
    """Returns process 0's answer, in every process."""
    return answer if jax.process_count() == 1 else _shared(str(answer))[0] == str(True)


def require_shared(directory: Path) -> None:
    """Raises InputError, in every process, unless all see this directory, which process 0 has made."""
    if jax.process_count() == 1:
        return
    mark = directory / _shared(f".seen-{uuid.uuid4().hex}")[0]
    if jax.process_index() == 0:
        mark.touch()
    _shared("")  # it is there
    blind = [str(number) for number, seen in enumerate(_shared(str(mark.exists()))) if seen != str(True)]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise InputError(
            f"{directory} of process(es) {', '.join(blind)} is not that of process 0: give one that all machines share"
        )


def _shared(text: str) -> list[str]:
    """Returns the texts of all processes, cut to a fixed number of bytes."""
    own = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    own[: len(data)] = data
    rows = multihost_utils.process_allgather(own)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(rows)]
