"""Reading checkpoints: the newest step that verifies, placed on devices or as numpy arrays."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from sbv2_jax.checkpoint.files import step_numbers
from sbv2_jax.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    read_manifest,
)
from sbv2_jax.checkpoint.parts import check, same
from sbv2_jax.errors import InputError, listed

Flat = dict[str, Any]
Result = TypeVar("Result")

# Bytes of whole arrays, where a process needs whole ones.
_AT_A_TIME = 2**29


def load(
    directory: str | Path, step: int | None = None, prefix: str = ""
) -> tuple[int, dict[str, np.ndarray], Manifest]:
    """Reads the leaves whose names start with `prefix` from the newest step that verifies, or from `step`.

    Returns the step, `{name without the prefix: host array}` and the manifest; takes no lock, so it can read
    a run that is training. Raises InputError where nothing is stored, CheckpointError where nothing verifies.
    """
    directory = Path(directory)

    def read(found: int) -> tuple[dict[str, np.ndarray], Manifest]:
        manifest = read_manifest(directory / str(found), found)
        names = [name for name in manifest.leaves if name.startswith(prefix)]
        if not names:
            groups = sorted({name.split(".")[0] for name in manifest.leaves})
            raise InputError(f"{directory / str(found)} holds no leaf {prefix}*; it has {', '.join(groups)}")
        leaves = read_verified(directory / str(found), manifest, dict.fromkeys(names, np.ndarray))
        return {name.removeprefix(prefix): leaves[name] for name in names}, manifest

    if step is None and not step_numbers(directory):
        raise InputError(f"no checkpoint in {directory}")
    found, (leaves, manifest), _ = first_good(directory, step, read)
    return found, leaves, manifest


def first_good(
    directory: Path, step: int | None, read: Callable[[int], Result]
) -> tuple[int, Result, list[int]]:
    """Returns the newest step that `read` accepts, what it returned, and the newer steps that it refused.

    `read` raises CheckpointError for a damaged step, which is skipped with a warning; with an explicit `step`
    there is no fallback. Raises CheckpointError, with every reason, where no step is left.
    """
    if step is not None and not (directory / str(step)).is_dir():
        stored = _numbers(step_numbers(directory)) or "none"
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; stored: {stored}")
    if step is not None:
        try:
            return step, read(step), []
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {directory / str(step)} cannot be used: {error}") from error
    reasons: dict[int, str] = {}
    for candidate in reversed(step_numbers(directory)):
        try:
            return candidate, read(candidate), list(reasons)
        except CheckpointError as error:
            reasons[candidate] = str(error)
            logging.warning("skipped checkpoint %s: %s", directory / str(candidate), error)
    listed = "; ".join(f"step {number}: {reason}" for number, reason in reasons.items())
    raise CheckpointError(f"no usable checkpoint in {directory} (nothing was changed): {listed}")


def read_verified(directory: Path, manifest: Manifest, targets: Flat) -> Flat:
    """Reads the named leaves of a step and compares each with its digest.

    Args:
      directory: the step's directory.
      manifest: its manifest.
      targets: for each leaf to read, `np.ndarray` or a ShapeDtypeStruct with the sharding to restore onto.

    Each process compares what it restores for itself, and no array is gathered. Raises CheckpointError that names each
    leaf which differs. Every process of a run calls this together.
    """
    leaves, reason = {}, ""
    try:
        leaves = _read(directory, manifest, targets)
    except Exception as error:  # noqa: BLE001 (damaged files raise whatever their decoder raises)
        reason = f"unreadable: {_first_line(error)}"
    _raise_together(reason)
    wrong, unknown = check(manifest.leaves, leaves)
    try:
        wrong += _unlike_whole(directory, manifest, {name: leaves[name] for name in unknown})
    except Exception as error:  # noqa: BLE001 (as above)
        reason = f"unreadable: {_first_line(error)}"
    _raise_together(reason or listed([f"{name} does not match its SHA-256" for name in wrong]))
    return leaves


def _read(directory: Path, manifest: Manifest, targets: Flat) -> Flat:
    item = {name: _abstract(manifest, name, target) for name, target in targets.items()}
    restore_args = {name: _restore_args(item[name], target) for name, target in targets.items()}
    # Not within a Checkpointer: its restore ends in a barrier, where a process that could read its own shards would
    # wait for one that could not.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        return handler.restore((directory / "state").absolute(), args=args)
    finally:
        handler.close()


def _unlike_whole(directory: Path, manifest: Manifest, leaves: Flat) -> list[str]:
    """Returns the names of the leaves that do not have the values of the whole arrays, which are read and verified.

    For a leaf that was saved in other parts than it is restored in: no process has all that one digest is of.
    """
    wrong = []
    for names in _groups(manifest, leaves):
        whole = _read(directory, manifest, dict.fromkeys(names, np.ndarray))
        damaged, _ = check(manifest.leaves, whole)
        wrong += [name for name in names if name in damaged or not same(whole[name], leaves[name])]
    return wrong


def _groups(manifest: Manifest, names: Iterable[str]) -> Iterator[list[str]]:
    """Yields names of leaves that are read at a time: each reading has its cost, and all must be in memory."""
    group: list[str] = []
    filled = 0
    for name in names:
        stored = manifest.leaves[name]
        size = math.prod(stored["shape"]) * jax.numpy.dtype(stored["dtype"]).itemsize
        if group and filled + size > _AT_A_TIME:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def _abstract(manifest: Manifest, name: str, target: Any) -> jax.ShapeDtypeStruct:
    if target is not np.ndarray:
        return target
    stored = manifest.leaves[name]
    return jax.ShapeDtypeStruct(tuple(stored["shape"]), jax.numpy.dtype(stored["dtype"]))


def _restore_args(abstract: jax.ShapeDtypeStruct, target: Any) -> ocp.RestoreArgs:
    if target is np.ndarray:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=abstract.dtype)
    # Without a sharding Orbax would take the saved one, which may name devices that are not here.
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=target.shape, dtype=target.dtype, strict=True)


def _raise_together(reason: str) -> None:
    """Raises CheckpointError on every process if there is a reason on any, so that all fall back alike."""
    if jax.process_count() > 1:
        failed = np.asarray(multihost_utils.process_allgather(np.array(bool(reason))))
        if failed.any() and not reason:
            reason = f"refused by processes {_numbers(np.flatnonzero(failed))}"
    if reason:
        raise CheckpointError(reason)


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(int(value)) for value in values)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
