"""A batch that is split over devices stays where it is: no collective in the VSD gradient, nor in guided sampling."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found() -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "interleaved_run.py"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["gradient", "pictures"])
@pytest.mark.slow
def test_no_row_leaves_its_device(found, what):
    assert found[what]["collectives"] == []
    assert found[what]["behind"] > 0, "one batch behind the other moves rows"


@pytest.mark.parametrize("what", ["gradient", "pictures"])
def test_the_result_is_that_of_one_batch_behind_the_other_bit_for_bit(found, what):
    assert found[what]["same"]
    assert found[what]["error"] < 1e-5, "over eight devices, whose products are of other sizes"
