"""The memory of a process whose device is the CPU, where each step takes and frees what it computes with."""

import ctypes
import platform
from pathlib import Path

import jax

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# What TPUs and GPUs are to Linux.
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def keep_freed_memory() -> None:
    """Has the C library keep what a step frees for the next one, where the CPU is the device and the library is glibc.

    It would give large blocks back to the kernel at once and get them again a moment later, page by page and zeroed:
    an eighth of the cores' time in the OpenMoji step, and a GiB more at its peak. Memory that the process needed once
    stays its own until it ends, so this is for those that repeat what they do. It must come before JAX looks at its
    devices, for it is too late for threads that there are.
    """
    if platform.libc_ver()[0] != "glibc" or not _on_cpu():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)  # of their own, threads take large blocks from the kernel in any case
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _on_cpu() -> bool:
    """Whether JAX will find no other device; a guess, which decides about nothing but memory."""
    if chosen := jax.config.jax_platforms:  # type: ignore[attr-defined]  # JAX declares none of them
        return chosen.split(",")[0] == "cpu"
    return not any(file for name in _ACCELERATORS for file in Path("/dev").glob(name))
