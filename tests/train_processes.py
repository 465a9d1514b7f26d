"""The training command as several processes: started together, and how each of them ended."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forked_commands import Forked
from train_command import command, start


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launch(count: int, world: Path, workdir: Path | list[Path], *flags: str, **changes) -> list[Forked]:
    """Starts the processes of one run; `workdir` and `changes` may be lists of values, one for each process."""
    workdirs = workdir if isinstance(workdir, list) else [workdir] * count
    port = free_port()
    processes = []
    for index in range(count):
        own = {name: value[index] if isinstance(value, list) else value for name, value in changes.items()}
        joined = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
        processes.append(
            start(command(world, workdirs[index], *(joined if count > 1 else []), *flags, **own))
        )
    return processes


def ended(processes: list[Forked]) -> list[tuple[int, str]]:
    """Waits for all; returns exit codes and what they wrote on stderr."""
    # All at once: one whose pipe is full would wait for its reader, and the others for it.
    with ThreadPoolExecutor(len(processes)) as pool:
        errors = list(pool.map(lambda process: process.communicate(timeout=300)[1], processes))
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
