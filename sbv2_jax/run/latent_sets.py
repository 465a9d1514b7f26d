"""How a set of latents is made: in shards, by every device of every process, and gone on with after an interruption."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from sbv2_jax.convert.formats.files import read_json, replaced_file, write_json
from sbv2_jax.data.latent_sets import MANIFEST, pack, sha256_of, shard_names
from sbv2_jax.devices import processes
from sbv2_jax.devices.sharding import batch_sharding, make_mesh
from sbv2_jax.errors import InputError
from sbv2_jax.run.arrays import place
from sbv2_jax.tree import Params

_POLL_SECONDS = 0.25


class Maker(Protocol):
    """Makes the latents of a set by their numbers, `at_a_time` of them."""

    at_a_time: int

    def make(self, numbers: range) -> tuple[np.ndarray, Sequence[str]]:
        """Returns latents [len(numbers), h, w, C] in the dtype of the files, and their prompts."""
        ...


def require_same(out: Path, things: str, settings: Mapping[str, Any]) -> None:
    """Raises InputError, naming what differs, where a directory holds a set of other settings, or anything else."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file, not a directory")
    if not (out / MANIFEST).exists():
        if out.exists() and any(name for name in os.listdir(out) if not name.startswith(".")):
            raise InputError(
                f"--out={out} is not empty, and has no {MANIFEST} of {things}: give another directory"
            )
        return
    there = read_json(out / MANIFEST)
    differ = []
    for name, here in settings.items():
        was = there.get(name)
        if was == here:
            continue
        if name == "made_from" and isinstance(was, dict):
            parts = [part for part in sorted(was.keys() | here.keys()) if was.get(part) != here.get(part)]
            differ.append(f"the model differs in {', '.join(parts)}")
        elif name in ("prompts", "pictures"):
            differ.append(f"the {name} differ")
        else:
            differ.append(f"{name} is {was!r} there, {here!r} here")
    if differ:
        raise InputError(f"--out={out} holds {things} of other settings: {'; '.join(differ)}")


def make_set(
    out: Path, thing: str, things: str, settings: Mapping[str, Any], maker: Callable[[], Maker]
) -> None:
    """Makes those shards of a set that are not there, or not what its manifest says, and the manifest of all.

    Every process calls it.

    `settings` are the manifest's, which `require_same` has compared; the processes share out the shards. `maker` is
    called where there is something to make.
    """
    with processes.together():
        if jax.process_index() == 0:
            _begin(out, settings)
    processes.require_shared(out)
    names = shard_names(things, settings["count"], settings["shard_size"])
    # One that fails here ends all, and one that is ready waits without a collective, which has a time limit.
    _make_shards(out, thing, names, settings, maker)
    while not all((out / name).exists() for name in names):
        time.sleep(_POLL_SECONDS)
    with processes.together():
        if jax.process_index() == 0:
            shards = {name: sha256_of(out / name) for name in names}
            with replaced_file(out / MANIFEST) as partial:
                write_json(partial, {**settings, "shards": shards})
            print(f"{settings['count']} {thing}(s) in {len(names)} shard(s): {out}")


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the directory and its manifest, and removes what a killed run left unfinished, or was changed since."""
    for left in out.glob(".*.partial-*"):
        left.unlink()
    if not (out / MANIFEST).exists():
        with replaced_file(out / MANIFEST) as partial:
            write_json(partial, dict(settings))
    for name, digest in read_json(out / MANIFEST).get("shards", {}).items():
        if (out / name).exists() and sha256_of(out / name) != digest:
            print(f"{out / name} is not what {MANIFEST} says: it is made again", file=sys.stderr, flush=True)
            (out / name).unlink()


def _make_shards(
    out: Path, thing: str, names: Sequence[str], settings: Mapping[str, Any], maker: Callable[[], Maker]
) -> None:
    """Makes and writes those of this process's shards that are not there."""
    count, size = settings["count"], settings["shard_size"]
    todo = {
        name: range(number * size, min(count, (number + 1) * size))
        for number, name in list(enumerate(names))[jax.process_index() :: jax.process_count()]
        if not (out / name).exists()
    }
    if not todo:
        return
    made = maker()
    with tqdm(total=sum(map(len, todo.values())), unit=thing, disable=jax.process_index() > 0) as bar:
        for name, numbers in todo.items():
            records: list[bytes] = []
            for start in range(0, len(numbers), made.at_a_time):
                some = numbers[start : start + made.at_a_time]
                latents, prompts = made.make(some)
                _require_finite(thing, some, latents, prompts)
                records += map(pack, some, latents, prompts)
                bar.update(len(some))
            _write_shard(out / name, records)


def _require_finite(thing: str, numbers: range, latents: np.ndarray, prompts: Sequence[str]) -> None:
    for number, latent, prompt in zip(numbers, latents, prompts, strict=True):
        if not np.isfinite(latent).all():
            raise InputError(
                f"the latent of {thing} {number} is not finite in {latents.dtype}; its prompt is {prompt!r}"
            )


def _write_shard(path: Path, records: Sequence[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with replaced_file(path) as partial:
        try:
            # Each record can be read by itself; latents hardly compress.
            writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # a bare C++ error, of a full disk too
            raise InputError(f"cannot write {path}: {error}") from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())


class OnEveryDevice:
    """A function of weights and rows, over all devices of this process, `batch_size` rows on each at a time."""

    def __init__(self, function: Callable[[Any, Mapping[str, jax.Array]], jax.Array], batch_size: int):
        devices = jax.local_devices()
        mesh = make_mesh(1, len(devices), 1, devices)
        self.at_a_time = batch_size * mesh.size
        self._everywhere, self._rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
        whole, rows = PartitionSpec(), self._rows.spec
        # Each device runs the program of one alone: split by the compiler, its numbers would be rounded otherwise.
        self._function = jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False)
        )

    def hold(self, weights: Mapping[str, np.ndarray]) -> Params:
        """Returns weights as every device holds them."""
        return place(weights, dict.fromkeys(weights, self._everywhere))

    def __call__(self, weights: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns what the function makes of `at_a_time` rows or fewer, [N, ...] each."""
        count = len(next(iter(rows.values())))
        # The last ones are filled up, so that one compiled program serves all.
        filled = np.minimum(np.arange(self.at_a_time), count - 1)
        placed = place({name: one[filled] for name, one in rows.items()}, dict.fromkeys(rows, self._rows))
        return np.asarray(self._function(weights, placed))[:count]
