"""The memory of a process whose device is the CPU: what compiling takes is not held beside what the steps take."""

import ctypes
import platform
from pathlib import Path

import jax

_M_ARENA_MAX = -8  # glibc's malloc.h
# What TPUs and GPUs are to Linux.
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def share_one_arena() -> None:
    """Has all threads of a process on the CPU allocate from one arena: what one frees, another takes.

    Compiling and drawing run on threads that come and go; each would keep an arena with what it had at its peak. It
    must come before JAX looks at its devices, for threads that are there keep theirs. Without glibc it does nothing.
    """
    if (libc := _glibc()) and _on_cpu():
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Gives the kernel what is free now, such as what compiling has left, where the CPU is the device.

    That large blocks go back at each step costs an eighth of the cores' time in the OpenMoji run, in pages that the
    kernel clears again; but kept, they are cut up by what is allocated between two steps, and a GiB is taken anew.
    """
    if (libc := _glibc()) and jax.default_backend() == "cpu":
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _on_cpu() -> bool:
    """Whether JAX will find no other device; a guess, which decides about nothing but memory."""
    if chosen := jax.config.values["jax_platforms"]:
        return chosen.split(",")[0] == "cpu"
    return not any(file for name in _ACCELERATORS for file in Path("/dev").glob(name))
