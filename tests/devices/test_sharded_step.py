"""The step over a mesh of eight (fake) CPU devices against one device, and what lies where.

The devices must be there before JAX starts, so all of it runs in one process of its own, `sharded_run.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import measured

pytestmark = pytest.mark.slow

# Sums over the batch and over split dimensions are taken in another order. Errors are counted against the
# largest value of each tensor; where the gradients of the samples nearly cancel, their sum has a larger one.
WEIGHT_BOUND, MOMENT_BOUND, METRIC_BOUND = 2e-6, 5e-5, 1e-5
MESHES = ["1x2x4", "1x8x1", "1x1x8", "2x2x2"]


def run_sharded(meshes: list[str], shapes: dict[str, list[int]], changes: dict) -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "sharded_run.py"],
        input=json.dumps({"meshes": meshes, "shapes": shapes, "changes": changes}),
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict:
    return run_sharded(MESHES, {name: shape for name, (shape, *_) in SPECS.items()}, {})


def assert_equal_to_one_device(errors: dict[str, float]) -> None:
    for name, error in errors.items():
        bound = MOMENT_BOUND if name.endswith("_opt") else WEIGHT_BOUND
        assert measured(error) < (METRIC_BOUND if name == "metrics" else bound), name


@pytest.mark.parametrize("mesh", MESHES)
def test_two_sharded_steps_equal_those_of_one_device(found, mesh):
    """On 1x2x4 the batch is also accumulated in two passes, each of samples from every device."""
    assert_equal_to_one_device(found["errors"][mesh])


def test_sharded_steps_of_a_student_of_two_steps_equal_those_of_one_device():
    """With this seed the second one is trained, of samples that the first one made; accumulated in two passes."""
    changes = {"seed": 5, "student.timesteps": [999, 499]}
    found = run_sharded(["1x2x4"], {}, changes)
    assert_equal_to_one_device(found["errors"]["1x2x4"])
    assert found["again"]["1x2x4"] and found["moved"]["1x2x4"] == []


def test_sharded_steps_with_a_discriminator_equal_those_of_one_device():
    """With a score model beside it, and real latents in a quarter of the rows; accumulated in two passes."""
    changes = {"terms": ["vsd", "gan"], "gan.path": "drawn at random", "gan.share": 0.25, "gan.weight": 2.0}
    found = run_sharded(["1x2x4"], {}, changes)
    assert found["errors"]["1x2x4"].keys() >= {"discriminator", "discriminator_opt"}
    assert_equal_to_one_device(found["errors"]["1x2x4"])
    assert found["again"]["1x2x4"] and found["moved"]["1x2x4"] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_the_state_keeps_its_sharding_over_steps(found, mesh):
    assert found["moved"][mesh] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_runs_bit_identically_again(found, mesh):
    assert found["again"][mesh]


ON_THE_THIRD = [None, None, "fsdp"]
ON_THE_LAST = [None, None, None, "fsdp"]
SPECS = {  # of each leaf its shape, then its spec over meshes of 4, 1, 8 and 2 devices along fsdp
    "conv, two largest dimensions": ([3, 3, 320, 320], ON_THE_THIRD, [], ON_THE_THIRD, ON_THE_THIRD),
    "conv, one largest dimension": ([3, 3, 320, 640], ON_THE_LAST, [], ON_THE_LAST, ON_THE_LAST),
    "dense": ([1280, 320], ["fsdp"], [], ["fsdp"], ["fsdp"]),
    "largest is not divisible": ([1027, 320], [None, "fsdp"], [], [None, "fsdp"], [None, "fsdp"]),
    "largest is divisible by 4 only": ([1028, 320], ["fsdp"], [], [None, "fsdp"], ["fsdp"]),
    "nothing is divisible": ([1027, 321], [], [], [], []),
    "bias": ([1280], [], [], [], []),
    "just too small": ([128, 127], [], [], [], []),
    "just large enough": ([128, 128], ["fsdp"], [], ["fsdp"], ["fsdp"]),
    "key": ([32768], [], [], [], []),
    "student_opt.0.count": ([32768], [], [], [], []),
}


@pytest.mark.parametrize("name", SPECS)
def test_specs(found, name):
    _, *specs = SPECS[name]
    assert [found["specs"][mesh][name] for mesh in MESHES] == specs


def test_the_batch_is_split_over_both_axes(found):
    for mesh in MESHES:
        assert found["batch"][mesh]["spec"] == [["replica", "data", "fsdp"]]
        assert found["batch"][mesh]["shard"] == found["batch_size"] // 8


def test_large_leaves_of_the_state_are_held_in_parts_and_small_ones_whole(found):
    """Weights, both moments and the average: bytes on one device over bytes in all, of what can be split."""
    for mesh, parts in (("1x2x4", 4), ("1x8x1", 1), ("1x1x8", 8), ("2x2x2", 2)):
        held = found["held"][mesh]
        assert held["large"] == pytest.approx(1 / parts), mesh
        assert held["small"] == 1.0
