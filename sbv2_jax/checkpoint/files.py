"""The files of a checkpoint directory: the lock, the numbered steps, fsync and atomic moves."""

import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import TextIO

from sbv2_jax.errors import InputError

# Holds what is being written or deleted: always disposable, emptied by the next owner of the lock.
PARTIAL = ".partial"


def mounted(directory: str | Path) -> Path:
    """Returns the path of a directory, `~` expanded; raises InputError for an address, such as that of a bucket."""
    if "://" in str(directory):
        raise InputError(f"{directory} is an address: give a directory of a mounted file system")
    return Path(directory).expanduser()


def open_directory(directory: Path) -> TextIO:
    """Creates the directory, locks it for this process and clears what a killed one left half-written.

    Returns the open lock file; the lock ends when it is closed or the process dies.
    Raises InputError where another process holds the lock, and where the directory cannot be written or does not
    rename others, as a bucket's may not.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = locked(directory)
        shutil.rmtree(directory / PARTIAL, ignore_errors=True)
        probe = directory / PARTIAL / "probe"
        probe.mkdir(parents=True)
        (probe / "file").touch()
        shutil.rmtree(probe.rename(probe.with_name("renamed")))
    except OSError as error:
        raise InputError(f"cannot write checkpoints to {directory}: {error.strerror or error}") from error
    return lock


def locked(directory: Path) -> TextIO:
    """Locks a directory for this process, as `open_directory` does; returns the open lock file."""
    lock = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held for the whole run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise InputError(f"{directory} is in use by {holder}: two runs cannot share a directory") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def step_numbers(directory: Path) -> list[int]:
    """Returns the numbers of the step directories, in ascending order, whatever they hold."""
    if not directory.is_dir():
        return []
    # Only the canonical spelling counts: "007" or an Arabic-Indic digit is somebody else's directory.
    return sorted(
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and path.name == str(int(path.name)) and path.is_dir()
    )


def file_sizes(directory: Path) -> dict[str, int]:
    """Returns the bytes of every file under a directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def fsync_path(path: Path) -> None:
    """Forces a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Forces every file and directory under a directory to the disk, and the directory itself last."""
    for path in sorted(directory.rglob("*"), reverse=True):
        fsync_path(path)
    fsync_path(directory)


def write_durably(path: Path, text: str) -> None:
    """Writes a new text file and forces it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fsync_path(path.parent)


def publish(directory: Path, step: int) -> None:
    """Moves the finished `.partial/<step>` to `<step>` in one rename, replacing a damaged one if any."""
    final = directory / str(step)
    if final.exists():
        discard(directory, step)
    os.rename(directory / PARTIAL / str(step), final)
    fsync_path(directory)


def discard(directory: Path, step: int) -> None:
    """Deletes a step: one rename takes it out of sight, so that a kill midway leaves no half-deleted step."""
    trash = directory / PARTIAL / f"discarded-{step}"
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(directory / str(step), trash)
    fsync_path(directory)
    shutil.rmtree(trash, ignore_errors=True)
