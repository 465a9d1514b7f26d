"""Programs as a shell calls them, each in a fork of one process: what they import, seconds, is imported once.

A fork is a process of its own, with the environment, the signals and the end of one that was started; only what it
imports is there already. A test of the start itself starts one.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]
_LARGEST = 2**17  # bytes of a request: a command line and an environment
_ADDED = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
_CACHE = "JAX_COMPILATION_CACHE_DIR"


class Done(NamedTuple):
    code: int
    said: str


class Forked:
    """A program that runs, with what the tests use of `subprocess.Popen`."""

    def __init__(self, forks: "Forks", pid: int, stdout: int, stderr: int):
        self.pid, self.returncode = pid, None
        self.stdout, self.stderr = (os.fdopen(each, encoding="utf-8") for each in (stdout, stderr))
        self._forks, self._end = forks, os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Returns the exit code, as `subprocess.Popen` has it, or None while the program runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; returns what the program wrote to stdout and stderr, but for what was read before."""
        with ThreadPoolExecutor(2) as pool:  # it waits for who reads a pipe that is full
            said = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except BaseException:  # too late, or Ctrl-C
                self.kill()  # else the two would read on
                raise
        out, err = (each.result() for each in said)
        self.stdout.close()
        self.stderr.close()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._end, select.POLLIN)
            if not waiting.poll(None if timeout is None else 1000 * timeout):
                return None
            self.returncode = self._forks.ask({"ended": self.pid})
            os.close(self._end)
        return self.returncode


class Forks:
    """The process that is forked."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=os.environ
                | _ADDED
                | {"OMP_NUM_THREADS": "1"},  # else numpy makes threads when it is imported
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._lock = threading.Lock()

    def start(
        self, words: Sequence[str], cwd: Path = ROOT, environment: Mapping[str, str] | None = None
    ) -> Forked:
        """Starts what `python words...` would, in a directory; `environment` is added to that of the tests."""
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        try:
            request = {
                "words": [*words],
                "cwd": str(cwd),
                "environment": os.environ | _ADDED | (environment or {}),
            }
            return Forked(self, self.ask(request, their_out, their_err), out, err)
        finally:
            os.close(their_out)
            os.close(their_err)

    def run(self, words: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> Done:
        """Runs a program to its end; returns its exit code, and what it wrote to stdout and stderr."""
        process = self.start(words, cwd, environment)
        said = "".join(process.communicate())
        return Done(process.returncode, said)

    def ask(self, request: Mapping[str, object], *files: int) -> int:
        message = json.dumps(request).encode()
        assert len(message) < _LARGEST
        with self._lock:
            socket.send_fds(self._socket, [message], files)
            return int(self._socket.recv(_LARGEST))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@functools.cache
def forks() -> Forks:
    """Returns the process that all tests of this one fork, made when the first of them asks."""
    made = Forks()
    atexit.register(made.close)
    return made


def _become(words: list[str], cwd: str, environment: dict[str, str]) -> NoReturn:
    """Ends this process as `python words...` would, in that directory and environment."""
    import jax

    changed = {name for name, value in environment.items() ^ os.environ.items() if name.startswith("JAX_")}
    assert changed <= {_CACHE}, "jax has read its variables"
    if changed:
        jax.config.update("jax_compilation_cache_dir", environment.get(_CACHE))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
    sys.exit()


def _serve(asked: socket.socket) -> None:
    """Answers each request, of a program or of the exit code of one that has ended, until the tests are gone."""
    # Nothing here makes threads or touches a device, which a fork could not go on with.
    import matplotlib.pyplot  # noqa: F401
    import transformers  # noqa: F401

    import sbv2_jax.openmoji.pretrain.run
    import sbv2_jax.run.conversions
    import sbv2_jax.run.evaluation
    import sbv2_jax.run.latents
    import sbv2_jax.run.loop
    import sbv2_jax.run.pairs  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()  # no fork looks through what all of them have
    while True:
        message, files, _, _ = socket.recv_fds(asked, _LARGEST, 2)
        if not message:
            return
        request = json.loads(message)
        if "ended" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["ended"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                asked.close()
                for target, file in enumerate(files, start=1):
                    os.dup2(file, target)
                    os.close(file)
                _become(**request)
        for file in files:
            os.close(file)
        asked.send(str(answer).encode())


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
