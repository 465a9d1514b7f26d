"""What the C library holds of freed memory, by what the kernel and the library itself say of a process."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is of glibc")

TAKEN = """
import ctypes, threading
from pathlib import Path
import jax
from sbv2_jax.devices.host_memory import give_back_freed_memory, share_one_arena
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def take_and_free():
    blocks = [libc.malloc(65536) for _ in range(2000)]  # 131 MB, each too small for pages of its own
    for block in blocks[:-1]:
        ctypes.memset(ctypes.c_void_p(block), 1, 65536)
        libc.free(ctypes.c_void_p(block))

def in_threads():
    threads = [threading.Thread(target=take_and_free) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
GIVEN_BACK = """
jax.devices()
in_threads()
before = resident()
give_back_freed_memory()
print(before - resident())
"""
ARENAS = """
share_one_arena()
in_threads()
file = ctypes.c_void_p(libc.fopen(b"{path}", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(Path("{path}").read_text().count("<heap nr="))
"""


def said(program: str, **variables: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", TAKEN + program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


def test_what_was_freed_goes_back_to_the_kernel():
    assert said(GIVEN_BACK) > 100e6


def test_the_threads_of_a_process_on_the_cpu_share_an_arena(tmp_path):
    program = ARENAS.format(path=tmp_path / "arenas")
    assert said(program) == 1
    assert said(program, JAX_PLATFORMS="tpu") > 1  # where the work is elsewhere, it is as it was
