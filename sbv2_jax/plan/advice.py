"""What would make a step fit that does not: less memory for more time, found by compiling it."""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from sbv2_jax.plan.plan import Plan


def advise(
    config: ConfigDict, devices: int, compiled: Callable[[ConfigDict], Plan]
) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Yields changes of the configuration with their plans, up to the first that fits.

    `compiled` plans a configuration.
    """
    for changes in remedies(config, devices):
        plan = compiled(changed(config, changes))
        yield changes, plan
        if plan.fits:
            return


def remedies(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Yields, one upon the other, changes of a configuration that take less memory, the cheapest in time first."""
    changes: dict[str, Any] = {}
    if config.remat != "block":
        changes["remat"] = "block"
        yield dict(changes)
    accumulate, fsdp = config.accumulate, max(config.mesh.fsdp, 1)
    most = min(devices // config.mesh.replica, 8 * fsdp)
    while True:
        if 2 * fsdp <= most:
            fsdp *= 2
            changes["mesh.fsdp"] = fsdp
            if config.mesh.data != -1:
                changes["mesh.data"] = devices // (fsdp * config.mesh.replica)
            yield dict(changes)
        elif config.batch_size % (2 * accumulate * devices) == 0:
            accumulate *= 2
            changes["accumulate"] = accumulate
            yield dict(changes)
        else:
            return


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns a copy of a configuration with these fields changed."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(changes)
    return copy
