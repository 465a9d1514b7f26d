"""Digests of arrays in parts: each process describes, and checks, what it holds, and no array is gathered.

The manifest has a digest for each part of an array that one device wrote. The parts are a grid: `parts` says how many
there are along each axis, and `sha256` lists their digests in C order. An array of one part has its digest alone.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.checkpoint.finite import is_finite
from sbv2_jax.checkpoint.manifest import CheckpointError, digest

# (start, stop) along each axis.
Region = tuple[tuple[int, int], ...]


class Described(NamedTuple):
    """What a process knows of the arrays that it saves: `leaves` as in the manifest, but `sha256` by position.

    `not_finite` names those that hold NaN or infinities in its part.
    """

    leaves: dict[str, dict[str, Any]]
    not_finite: list[str]


def describe_own(leaves: Mapping[str, Any], *, primary: bool) -> Described:
    """Returns the description of the parts that this process writes; hashing runs on several threads.

    An array of NumPy is that of the `primary` process.
    """
    found: dict[str, dict[str, Any]] = {}
    jobs: list[tuple[str, int, Any]] = []
    for name, leaf in leaves.items():
        shape = leaf.shape
        split = leaf.sharding.shard_shape(shape) if isinstance(leaf, jax.Array) else shape
        grid = [length // part for length, part in zip(shape, split, strict=True)]
        found[name] = {"shape": list(shape), "dtype": str(leaf.dtype), "parts": grid, "sha256": {}}
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    starts = [start for start, _ in _region(shard.index, shape)]
                    place = [start // part for start, part in zip(starts, split, strict=True)]
                    jobs.append((name, _flat(place, grid), shard.data))
        elif primary:
            jobs.append((name, 0, leaf))

    def one(job: tuple[str, int, Any]) -> tuple[str, bool]:
        host = np.asarray(job[2])
        return digest(host), not jnp.issubdtype(host.dtype, jnp.floating) or is_finite(host)

    not_finite: list[str] = []
    for (name, position, _), (sha256, finite) in zip(jobs, _threads(one, jobs), strict=True):
        found[name]["sha256"][str(position)] = sha256
        if not finite and name not in not_finite:
            not_finite.append(name)
    return Described(found, not_finite)


def joined(described: Iterable[Described]) -> Described:
    """Returns the leaves of a manifest from what all processes know of them.

    Raises CheckpointError where a part is nobody's.
    """
    leaves: dict[str, dict[str, Any]] = {}
    not_finite: set[str] = set()
    for each in described:
        not_finite |= set(each.not_finite)
        for name, entry in each.leaves.items():
            leaves.setdefault(name, {**entry, "sha256": {}})["sha256"] |= entry["sha256"]
    for name, entry in leaves.items():
        found, count = entry["sha256"], math.prod(entry["parts"])
        if len(found) != count:
            raise CheckpointError(f"{name} has {count} parts, and {len(found)} of them were saved")
        if count == 1:
            del entry["parts"]
        entry["sha256"] = found["0"] if count == 1 else [found[str(number)] for number in range(count)]
    return Described(leaves, [name for name in leaves if name in not_finite])


def held(leaf: Any) -> dict[Region, np.ndarray]:
    """Returns the parts of an array that are in this process, each once."""
    if not isinstance(leaf, jax.Array):
        host = np.asarray(leaf)
        return {tuple((0, length) for length in host.shape): host}
    shards = {_region(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
    return {region: np.asarray(data) for region, data in shards.items()}


def check(stored: Mapping[str, Mapping[str, Any]], leaves: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares what this process holds of each array with the digests of the manifest.

    Returns the names of those that differ, and of those that it cannot tell about: it holds a part of what has one
    digest, and another process the rest.
    """

    def one(name: str) -> bool | None:
        return _matches(stored[name], leaves[name])

    found = dict(zip(leaves, _threads(one, leaves), strict=True))
    return [name for name in found if found[name] is False], [name for name in found if found[name] is None]


def same(whole: np.ndarray, leaf: Any) -> bool:
    """Whether what this process holds of an array is, bit for bit, what the whole array has there."""
    return whole.shape == leaf.shape and all(
        digest(part) == digest(whole[_slices(region)]) for region, part in held(leaf).items()
    )


def _matches(entry: Mapping[str, Any], leaf: Any) -> bool | None:
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if (list(leaf.shape), str(leaf.dtype)) != (entry["shape"], entry["dtype"]):
        return False
    own, unknown = held(leaf), False
    for region, sha256 in _stored(entry):
        covered = sum(_volume(_overlap(region, each)) for each in own)
        if 0 < covered < _volume(region):
            unknown = True
        elif covered and digest(_cut(region, own)) != sha256:
            return False
    return None if unknown else True


def _stored(entry: Mapping[str, Any]) -> Iterator[tuple[Region, str]]:
    shape, sha256 = entry["shape"], entry["sha256"]
    grid = entry.get("parts", [1] * len(shape))
    digests = [sha256] if isinstance(sha256, str) else sha256
    positions = itertools.product(*(range(count) for count in grid))
    for position, each in zip(positions, digests, strict=True):
        parts = [length // count for length, count in zip(shape, grid, strict=True)]
        yield (
            tuple((start * part, (start + 1) * part) for start, part in zip(position, parts, strict=True)),
            each,
        )


def _cut(region: Region, own: Mapping[Region, np.ndarray]) -> np.ndarray:
    """Returns the values of a region out of parts that cover it."""
    for each, part in own.items():
        if _overlap(region, each) == region:
            return part[_slices(region, each)]
    cut = np.empty([stop - start for start, stop in region], next(iter(own.values())).dtype)
    for each, part in own.items():
        both = _overlap(region, each)
        if _volume(both):
            cut[_slices(both, region)] = part[_slices(both, each)]
    return cut


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    return tuple(each.indices(length)[:2] for each, length in zip(index, shape, strict=True))


def _overlap(one: Region, other: Region) -> Region:
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def _volume(region: Region) -> int:
    return math.prod(max(0, stop - start) for start, stop in region)


def _slices(region: Region, within: Region | None = None) -> tuple[slice, ...]:
    origin = [start for start, _ in within] if within else [0] * len(region)
    return tuple(slice(a - start, b - start) for (a, b), start in zip(region, origin, strict=True))


def _flat(position: list[int], grid: list[int]) -> int:
    return int(np.ravel_multi_index(position, grid)) if grid else 0


def _threads(function: Any, items: Iterable[Any]) -> list[Any]:
    # hashlib and NumPy let go of the interpreter lock, so threads do scale.
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        return list(pool.map(function, items))
