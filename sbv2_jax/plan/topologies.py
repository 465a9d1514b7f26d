"""TPU topologies by name: their devices without the hardware, and the figures of their chips."""

import dataclasses
import os
import re

import jax

from sbv2_jax.errors import InputError
from sbv2_jax.tree import GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a TPU generation.

    `usable` is the memory in bytes that the compiler lets a program have. `flops` is the peak of bfloat16
    products, in FLOP/s, `bandwidth` that of the memory and `links` that of all links to other chips, in
    bytes/s; `largest_slice` is how many devices such links join at most. Source: the pages of the generations in
    Google's Cloud TPU documentation; `usable` is what the compiler says when a program is too large.
    """

    usable: float
    flops: float
    bandwidth: float
    links: float
    largest_slice: int
    options: dict[str, str] = dataclasses.field(default_factory=dict)


CHIPS = {
    # Two cores of a v4 or v5p chip work as one device.
    "v4": Chip(
        usable=30.75 * GIB,
        flops=275e12,
        bandwidth=1.2e12,
        links=300e9,
        largest_slice=4096,
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(usable=15.75 * GIB, flops=197e12, bandwidth=0.82e12, links=200e9, largest_slice=256),
    "v5p": Chip(usable=95.7 * GIB, flops=459e12, bandwidth=2.765e12, links=600e9, largest_slice=6144),
    "v6e": Chip(usable=31.2 * GIB, flops=918e12, bandwidth=1.64e12, links=448e9, largest_slice=256),
    # A chip of this one, TPU v7 "Ironwood", has two devices, and each half of its memory, arithmetic and links.
    "tpu7x": Chip(
        usable=94.75 * GIB, flops=1153.5e12, bandwidth=3.69e12, links=600e9, largest_slice=2 * 9216
    ),
}


def devices_of(topology: str) -> tuple[Chip, list[jax.Device]]:
    """Returns the chip and the devices of a topology such as "v4:2x2x4", or "v4:2x2x4*2" of two such slices.

    Raises InputError for a name that is unknown, and where libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):\d+(?:x\d+)*(?:\*(\d+))?", topology)
    if match is None or match[1] not in CHIPS:
        raise InputError(
            f"unknown topology {topology!r}: expected GENERATION:AxB or AxBxC, of {', '.join(CHIPS)}, such as "
            "v4:2x2x4, or v4:2x2x4*2 for two slices"
        )
    chip = CHIPS[match[1]]
    # Without these libtpu looks for the machine that it should run on, and for a device of its own.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v4-8"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = chip.options | ({"num_slices": int(match[2])} if match[2] else {})
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.partition("*")[0], **options
        )
    except Exception as error:  # noqa: BLE001 (libtpu raises what it likes)
        reason = str(error).splitlines()[0]
        raise InputError(
            f"topology {topology!r} cannot be had (pip install jax[tpu] gives the compiler): {reason}"
        ) from error
    return chip, list(found.devices)
