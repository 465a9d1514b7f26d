"""A network's weights as an Orbax checkpoint, beside its `config.json`: verified when they are read.

The folder `orbax/` is laid out as one step of a run's checkpoints: Orbax's item `state`, a flat dictionary of
arrays in our names and axes, and a manifest of their shapes, types and SHA-256 digests.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from sbv2_jax.checkpoint.files import file_sizes
from sbv2_jax.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    changed_leaves,
    describe,
    json_digest,
    read_manifest,
    write_manifest,
)
from sbv2_jax.checkpoint.versions import versions
from sbv2_jax.convert.formats.safetensors_io import DTYPES
from sbv2_jax.errors import InputError, listed
from sbv2_jax.tree import Shapes

FOLDER = "orbax"


def has_params(directory: Path) -> bool:
    """Whether the weights of a model directory are an Orbax checkpoint.

    Raises InputError where there are safetensors files as well.
    """
    if not (directory / FOLDER).is_dir():
        return False
    if others := sorted(path.name for path in directory.glob("*.safetensors*")):
        raise InputError(f"{directory} has weights twice: {FOLDER}/ and {', '.join(others)}; remove one")
    return True


def check_params(directory: Path, shapes: Shapes) -> Manifest:
    """Compares the manifest of a model directory's weights with the network's shapes; reads no array.

    Raises InputError that lists every missing and unexpected name, every wrong shape and type, and for files
    that are links or are not those that the manifest counts.
    """
    folder = directory / FOLDER
    if links := [path.name for path in (folder, *folder.rglob("*")) if path.is_symlink()]:
        raise InputError(f"{folder} holds symbolic links: {listed(links, ', ')}")
    try:
        manifest = read_manifest(folder, 0)
        stored = {name: (tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in manifest.leaves.items()}
    except CheckpointError as error:
        raise InputError(f"{folder} cannot be used: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder} cannot be used: its manifest is not one ({error!r})") from error
    known = [str(dtype) for dtype in DTYPES.values()]
    wrong = [f"missing {name} {shape.shape}" for name, shape in shapes.items() if name not in stored]
    for name, (shape, dtype) in stored.items():
        if name not in shapes:
            wrong.append(f"unexpected {ascii(name)[1:-1]} {shape}")
            continue
        if shape != shapes[name].shape:
            wrong.append(f"{name} has shape {shape}, expected {shapes[name].shape}")
        if dtype not in known:
            wrong.append(f"{name} has type {dtype}, expected one of {', '.join(known)}")
    if wrong:
        raise InputError(f"{directory} does not fit its config.json in {len(wrong)} arrays: {listed(wrong)}")
    return manifest


def read_params(directory: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """Reads the weights of a model directory and compares every array with its digest.

    Each process reads for itself. Raises InputError as `check_params` does, and for damaged files, naming the
    arrays that are not what was written.
    """
    manifest = check_params(directory, shapes)
    # Only what the network has is read, whatever else the files hold.
    args = ocp.args.PyTreeRestore(
        item={
            name: jax.ShapeDtypeStruct(shape.shape, manifest.leaves[name]["dtype"])
            for name, shape in shapes.items()
        },
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in shapes},
        partial_restore=True,
    )
    options = _this_process()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        try:
            params = checkpointer.restore((directory / FOLDER / "state").absolute(), args=args)
        except Exception as error:  # noqa: BLE001 (damaged files raise whatever their decoder raises)
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{directory / FOLDER} is unreadable: {type(error).__name__}: {reason}"
            ) from error
    found = describe({name: np.asarray(params[name]) for name in shapes})
    if changed := changed_leaves(manifest.leaves, found):
        raise InputError(f"{directory / FOLDER} is damaged: {listed(changed)}")
    return params


def write_params(directory: Path, params: Mapping[str, np.ndarray]) -> None:
    """Writes the folder of `read_params` into a model directory; not atomic."""
    folder = directory / FOLDER
    folder.mkdir()
    leaves = dict(params)
    options = _this_process()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        checkpointer.save((folder / "state").absolute(), args=ocp.args.StandardSave(leaves))
    manifest = Manifest(
        step=0,
        config={},
        config_sha256=json_digest({}),
        fingerprint="",
        extra={},
        leaves=describe(leaves),
        files=file_sizes(folder),
        versions=versions("jax", "orbax-checkpoint"),
    )
    write_manifest(folder, manifest)


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Has Orbax wait for no other process: the first one of a run also exports alone."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
