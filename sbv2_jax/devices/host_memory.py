"""The memory of a process whose device is the CPU, where each step takes and frees what it computes with."""

import ctypes
import platform
from pathlib import Path

import jax

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# What TPUs and GPUs are to Linux.
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def share_one_arena() -> None:
    """Has all threads of a process on the CPU allocate from one arena: what one frees, another takes.

    Compiling and drawing run on threads that come and go; each would keep an arena with what it had at its peak. It
    must come before JAX looks at its devices, for threads that are there keep theirs. Without glibc it does nothing.
    """
    if (libc := _glibc()) and _on_cpu():
        libc.mallopt(_M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Gives the kernel what is free now, and keeps what is freed from now on, where the CPU is the device.

    The first is what compiling has left. The second is for the steps: glibc would give their large blocks back at once
    and get them again a moment later, page by page and zeroed, an eighth of the cores' time in the OpenMoji step.
    """
    if (libc := _glibc()) and jax.default_backend() == "cpu":
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _on_cpu() -> bool:
    """Whether JAX will find no other device; a guess, which decides about nothing but memory."""
    if chosen := jax.config.values["jax_platforms"]:
        return chosen.split(",")[0] == "cpu"
    return not any(file for name in _ACCELERATORS for file in Path("/dev").glob(name))
