"""Freed memory that stays with the process, by the pages that the kernel has to give it again."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource
import jax, jax.numpy as jnp
from sbv2_jax.devices.host_memory import keep_freed_memory, share_one_arena
if {keep}:
    share_one_arena()

@jax.jit
def step(x, y):  # blocks of 64 MiB, freed at its end
    return jnp.cumsum(x @ y, axis=0)[-1] @ jnp.ones(4096)

x, y = jnp.ones((4096, 64)), jnp.ones((64, 4096))
step(x, y).block_until_ready()  # the devices are there
if {keep}:
    keep_freed_memory()
for _ in range(8):  # until what it has is enough
    step(x, y).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step(x, y).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    found = subprocess.run(
        [sys.executable, "-c", STEPS.format(keep=keep)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is of glibc")
def test_steps_that_repeat_themselves_ask_the_kernel_for_few_pages():
    before = faults(keep=False)
    assert before > 4 * 64 * 256  # pages of 4 KiB: at least a block of each step
    assert faults(keep=True) < before / 3
