"""The manifest of a checkpoint: what every array must be, bit for bit, and which run wrote it."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.checkpoint.files import file_sizes, step_numbers, write_durably
from sbv2_jax.errors import InputError, listed

FORMAT = 1
FILENAME = "manifest.json"


class CheckpointError(InputError):
    """Raised when a checkpoint cannot be written, or when what is stored is not what was saved."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one step holds: `leaves` maps a name to `shape`, `dtype` and `sha256` of the C-order bytes.

    Where several devices wrote an array it has `parts` besides, and a digest for each of them (`checkpoint.parts`).
    """

    step: int
    config: dict[str, Any]
    config_sha256: str
    fingerprint: str
    extra: dict[str, Any]
    leaves: dict[str, dict[str, Any]]
    files: dict[str, int]
    versions: dict[str, str]
    # By content, {name: {"sha256": ...}}: what the run is made from. Empty in checkpoints older than this field.
    sources: dict[str, dict[str, str]] = field(default_factory=dict)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` into a finished step directory, durably, sealed by a digest of its own."""
    body = asdict(manifest)
    sealed = {"format": FORMAT, "sha256": json_digest(body), "body": body}
    write_durably(directory / FILENAME, json.dumps(sealed, allow_nan=False, indent=1) + "\n")


def read_manifest(directory: Path, step: int) -> Manifest:
    """Reads the manifest of a step and checks its seal and the sizes of the files.

    Raises CheckpointError with the reason where the step is unfinished, truncated or not ours, and InputError
    where another version of the format wrote it.
    """
    try:
        sealed = json.loads((directory / FILENAME).read_text(encoding="utf-8"))
        version, seal, body = sealed["format"], sealed["sha256"], sealed["body"]
    except FileNotFoundError:
        raise CheckpointError(f"no {FILENAME}: not a finished checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{FILENAME} is unreadable ({type(error).__name__})") from None
    if json_digest(body) != seal:
        raise CheckpointError(f"{FILENAME} does not match its own digest")
    if version != FORMAT:
        raise InputError(f"{directory / FILENAME} has format {version}; this version reads format {FORMAT}")
    manifest = Manifest(**body)
    if manifest.step != step:
        raise CheckpointError(f"{FILENAME} is of step {manifest.step}")
    found = {name: size for name, size in file_sizes(directory).items() if name != FILENAME}
    wrong = [f"{name} is missing" for name in manifest.files if name not in found]
    wrong += [
        f"{name} has {found[name]} bytes instead of {size}"
        for name, size in manifest.files.items()
        if name in found and found[name] != size
    ]
    if wrong:
        raise CheckpointError(listed(wrong))
    return manifest


def best_step(directory: Path, name: str, better: str) -> int | None:
    """Returns the finished step whose `extra` has the best number of this name, the later one of equals.

    `better` is "higher" or "lower". None where no sound step has the number.
    """
    found = []
    for step in step_numbers(directory):
        with contextlib.suppress(CheckpointError):
            value = read_manifest(directory / str(step), step).extra.get(name)
            if value is not None and math.isfinite(value):
                found.append((value if better == "higher" else -value, step))
    return max(found)[1] if found else None


def json_digest(value: Any) -> str:
    """Returns the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def describe(hosts: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Returns shape, dtype and SHA-256 of every array; hashing runs on several threads."""
    # hashlib lets go of the interpreter lock, so threads do scale.
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        digests = list(pool.map(digest, hosts.values()))
    return {
        name: {"shape": list(host.shape), "dtype": str(host.dtype), "sha256": digest}
        for (name, host), digest in zip(hosts.items(), digests, strict=True)
    }


def digest(host: np.ndarray) -> str:
    """Returns the SHA-256 of an array's bytes in C order."""
    if host.dtype.hasobject:  # what Orbax gives back for a leaf that its own metadata, damaged, do not list
        return "no array"
    return hashlib.sha256(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data).hexdigest()


def changed_leaves(stored: Mapping[str, Mapping], found: Mapping[str, Mapping]) -> list[str]:
    """Returns one line for every leaf of `found` that is not bit for bit what the manifest stored."""
    return [f"{name} does not match its SHA-256" for name in found if found[name] != stored[name]]


def unlike_leaves(stored: Mapping[str, Mapping], abstract: Mapping[str, Any]) -> list[str]:
    """Returns one line for every leaf that is missing, extra, or of another shape or dtype."""
    lines = [f"{name} is not in the checkpoint" for name in abstract if name not in stored]
    lines += [f"{name} is in the checkpoint only" for name in stored if name not in abstract]
    for name in abstract:
        if name not in stored:
            continue
        have = (tuple(stored[name]["shape"]), stored[name]["dtype"])
        want = (tuple(abstract[name].shape), str(abstract[name].dtype))
        if have != want:
            lines.append(
                f"{name} is {have[1]}{list(have[0])} in the checkpoint, {want[1]}{list(want[0])} expected"
            )
    return lines


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Returns one line for every field that differs between flat configurations, by the field's dotted name."""
    return {
        name: f"{name} was {old.get(name, _ABSENT)!r}, is {new.get(name, _ABSENT)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    }


def changed_sources(
    saved: Mapping[str, Mapping[str, str]], current: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Returns one line for every source of another content, by its name."""

    def said(source: Mapping[str, str] | None) -> str:
        if source is None:
            return "absent"
        commit = f" of commit {source['commit'][:12]}" if "commit" in source else ""
        return f"sha256 {source['sha256'][:12]}{commit}"

    return {
        name: f"the files of {name} were {said(saved.get(name))}, are {said(current.get(name))}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name, {}).get("sha256") != current.get(name, {}).get("sha256")
    }


def among(name: str, names: Sequence[str]) -> bool:
    """Whether a dotted name is one of these, or in one of these groups."""
    return any(name == each or name.startswith(each + ".") for each in names)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns a nested dictionary as dotted names, with tuples as lists, as JSON would give them back."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value, allow_nan=False))
    return flat
