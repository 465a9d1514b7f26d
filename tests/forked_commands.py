"""The programs as a shell calls them, each in a fork of one process: what they import, seconds, is imported once.

Run as a program it reads a JSON object a line (`words`, `cwd`, `out`) and answers with the command's exit code.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    code: int
    said: str


class Forks:
    """The process, and its commands; their files and caches of the user are below `home`."""

    def __init__(self, home: Path):
        self._out = home / "said"
        environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: list[str], cwd: Path) -> Done:
        """Runs `launch/NAME.py ...` in a directory; returns its exit code, and what it wrote to stdout and stderr."""
        given: Mapping[str, object] = {"words": words, "cwd": str(cwd), "out": str(self._out)}
        self._process.stdin.write(json.dumps(given) + "\n")
        self._process.stdin.flush()
        return Done(int(self._process.stdout.readline()), self._out.read_text(encoding="utf-8"))

    def close(self) -> None:
        self._process.communicate()


def _call(words: list[str], cwd: str, out: str) -> int:
    """Runs a program in place of this process, but for what is imported; returns its exit code."""
    os.chdir(cwd)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _serve() -> None:
    # Nothing here makes threads or touches a device, which a fork could not go on with.
    import matplotlib.pyplot  # noqa: F401
    import transformers  # noqa: F401

    import sbv2_jax.run.conversions
    import sbv2_jax.run.evaluation
    import sbv2_jax.run.latents
    import sbv2_jax.run.loop
    import sbv2_jax.run.pairs  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _call(**json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
