"""Meshes of machines that are not here: devices with all that a mesh asks of one."""

import dataclasses
import itertools

import numpy as np
import pytest

from sbv2_jax.devices.sharding import AXES, make_mesh
from sbv2_jax.errors import InputError

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX tells of a device; `slice_index` is the slice of a TPU, and the machine of a GPU."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0


def slices(kind: str, *shape: int, count: int = 1) -> list[Device]:
    """Returns the chips of so many slices, in the order of JAX: the last coordinate counts slowest."""
    places = [
        (index, coords[::-1])
        for index in range(count)
        for coords in itertools.product(*map(range, (*(1,) * (3 - len(shape)), *shape[::-1])))
    ]
    return [
        Device(number, index, device_kind=kind, coords=coords)
        for number, (index, coords) in enumerate(places)
    ]


def extents(devices: np.ndarray) -> tuple[int, ...]:
    """Returns the lengths of the smallest box around these chips."""
    coords = np.array([device.coords for device in devices.flat])
    return tuple((coords.max(0) - coords.min(0) + 1).tolist())


def ids(devices: np.ndarray) -> list[int]:
    return [device.id for device in devices.flat]


# Of each slice: the kind of its chips, its shape, fsdp, and the box that holds the chips of an fsdp group.
TORI = {
    "v6e-64": ("TPU v6 lite", (8, 8), 4, (4, 1, 1)),
    "v6e-128": ("TPU v6 lite", (8, 16), 4, (4, 1, 1)),
    "v6e-256": ("TPU v6 lite", (16, 16), 4, (4, 1, 1)),
    "v4 8x8x8": ("TPU v4", (8, 8, 8), 4, (4, 1, 1)),
    "v5p 8x8x8": ("TPU v5", (8, 8, 8), 4, (4, 1, 1)),
    "v4 4x4x4 by 2": ("TPU v4", (4, 4, 4), 2, (2, 1, 1)),
    "v4 4x4x4 by 8": ("TPU v4", (4, 4, 4), 8, (4, 2, 1)),
    "v5p 4x4x4 by 2": ("TPU v5", (4, 4, 4), 2, (2, 1, 1)),
    "v5p 4x4x4 by 8": ("TPU v5", (4, 4, 4), 8, (4, 2, 1)),
    "v5e-16": ("TPU v5 lite", (4, 4), 8, (4, 2, 1)),
    "v5e-256": ("TPU v5 lite", (16, 16), 8, (8, 1, 1)),
    "v4-16": ("TPU v4", (2, 2, 2), 4, (2, 2, 1)),
    "v4-64": ("TPU v4", (2, 4, 4), 4, (1, 4, 1)),
    "v4-256": ("TPU v4", (4, 4, 8), 4, (4, 1, 1)),
    "v5e-8": ("TPU v5 lite", (2, 4), 8, (2, 4, 1)),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", TORI)
def test_an_fsdp_group_fills_a_box_of_the_torus(name, count):
    """Of two slices each is a replica, laid out as one alone."""
    kind, shape, fsdp, box = TORI[name]
    devices = slices(kind, *shape, count=count)
    mesh = make_mesh(count, len(devices) // (count * fsdp), fsdp, devices)
    assert mesh.axis_names == AXES and mesh.devices.shape == (count, len(devices) // (count * fsdp), fsdp)
    assert sorted(ids(mesh.devices)) == list(range(len(devices)))
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [
        {index} for index in range(count)
    ]
    assert np.prod(box) == fsdp
    assert {extents(group) for group in mesh.devices.reshape(-1, fsdp)} == {box}


def test_the_order_within_a_group_is_that_of_the_links():
    def first(name):
        kind, shape, fsdp, _ = TORI[name]
        devices = slices(kind, *shape)
        return ids(make_mesh(1, len(devices) // fsdp, fsdp, devices).devices[0, 0])

    assert first("v6e-64") == [0, 1, 2, 3]
    assert first("v4-16") == [0, 2, 1, 3]
    assert first("v4-64") == [0, 2, 4, 6]
    assert first("v5e-8") == [0, 1, 2, 3, 7, 6, 5, 4], "a ring"


def test_each_slice_is_one_replica():
    devices = slices("TPU v4", 2, 2, 1, count=2)
    for replica, data in ((1, 4), (4, 1)):
        with pytest.raises(InputError) as error:
            make_mesh(replica, data, 2, devices)
        assert str(error.value) == (
            f"config.mesh.replica = {replica} does not fit the 2 slices that are here, each of which is one replica"
        )


def test_chips_that_are_no_torus_are_one_line():
    devices = slices("TPU v4", 4, 4, 4)
    with pytest.raises(InputError) as error:
        make_mesh(1, 15, 4, devices[:30] + devices[34:])
    said = str(error.value)
    assert said.startswith("config.mesh: 1 x 15 x 4 devices cannot be laid out: ") and "\n" not in said


@pytest.mark.parametrize(("replica", "data", "fsdp"), [(1, 2, 8), (2, 1, 8), (2, 2, 4), (1, 16, 1)])
def test_machines_of_gpus_are_no_slices(replica, data, fsdp):
    """XLA gives the GPUs of each machine a slice of their own; ids count them machine by machine."""
    devices = [Device(number, number // 8, "gpu", "NVIDIA H100") for number in range(16)]
    mesh = make_mesh(replica, data, fsdp, devices[8:] + devices[:8])
    assert mesh.devices.shape == (replica, data, fsdp)
    assert ids(mesh.devices) == list(range(16))
