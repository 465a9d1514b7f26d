"""What a run is made from, by content: a SHA-256 of each network, schedule and tokenizer, wherever its files lie."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sbv2_jax.checkpoint.manifest import json_digest
from sbv2_jax.convert.formats.component import weight_files
from sbv2_jax.convert.formats.side_files import tokenizer_files
from sbv2_jax.errors import InputError
from sbv2_jax.fields import field_names, nearest
from sbv2_jax.run.components import Part, Parts

# The fields that say where a source is; what it is, its digest says.
PLACES = (
    "teacher",
    "student.init",
    "clip.model",
    "clip.decoder",
    "reward.model",
    "pairs.path",
    "gan.path",
    "prompts",
    "prompts_column",
)
_CACHE = "digests.json"
# What these say of a tokenizer is in its repr; the rest of them, such as where it came from, changes no token.
_UNREAD = ("tokenizer_config.json", "special_tokens_map.json")

Source = dict[str, str]


class Files:
    """The SHA-256 of files, read once: what a run's directory remembers of the same size and time is believed."""

    def __init__(self, workdir: Path):
        self._path = workdir / _CACHE
        self._known: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):  # it only spares time
            self._known = json.loads(self._path.read_text(encoding="utf-8"))

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """Returns the digests of files, sorted: their names and order say nothing. Raises OSError."""
        # hashlib lets go of the interpreter lock, so threads do scale.
        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
            return sorted(pool.map(self._digest, paths))

    def remember(self) -> None:
        """Writes what is known into the run's directory, in one rename."""
        scratch = self._path.with_suffix(".json.tmp")
        scratch.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
        scratch.replace(self._path)

    def _digest(self, path: Path) -> str:
        path = path.resolve()
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if not isinstance(known, list) or known[:2] != state:
            with open(path, "rb") as file:
                known = self._known[str(path)] = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
        return known[2]


def sources_of(parts: Parts, files: Files) -> dict[str, Source]:
    """Returns {name: {"sha256": ..., "commit": ...}} of all that a run reads but its prompts.

    The digest of a network is over its configuration and the bytes of its weights, whatever else lies beside them;
    `commit` is the hub's, of files in its cache.
    """
    found: dict[str, Source] = {}
    facts: dict[str, Any]
    for name, value in _flat(vars(parts)):
        if isinstance(value, Part):
            facts = {
                "config": _facts(value.config),
                "weights": files.digests(weight_files(value.files)),
                "tokens": _tokens(value.files, files),
            }
            found[name] = {"sha256": json_digest(facts), **_commit(value.files)}
        elif name == "tokenizer":
            directory, _ = parts.opened
            folders = sorted(directory.glob("tokenizer*"))
            facts = {"tokens": [_tokens(folder, files) for folder in folders], "is": repr(value)}
            found[name] = {"sha256": json_digest(facts), **_commit(directory)}
        elif dataclasses.is_dataclass(value) and not name.endswith("tokenizer"):
            found[name] = {"sha256": json_digest(_facts(value))}
    found["zero_null"] = {"sha256": json_digest(parts.zero_null)}
    return found


def check_forced(names: Iterable[str], config: ConfigDict, sources: Mapping[str, Source]) -> None:
    """Raises InputError that names the first of `--force` that is no field, group of fields or source."""
    fields = field_names(config)
    groups = {name.rsplit(".", depth)[0] for name in fields for depth in range(1, name.count(".") + 1)}
    known = {*fields, *groups, *sources}
    for name in names:
        if name not in known:
            raise InputError(f"--force={name}: no such field or source{nearest(name, sorted(known), '')}")


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _facts(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration that are not their defaults: one that a later version adds says nothing.

    Nor does one that only pictures depend on.
    """
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.metadata.get("of_pictures")
    }
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    said = {name: value for name, value in fields.items() if value != defaults[name]}
    return {name: _facts(value) if dataclasses.is_dataclass(value) else value for name, value in said.items()}


def _tokens(directory: Path, files: Files) -> list[str]:
    if not (directory / "tokenizer_config.json").is_file():
        return []
    return files.digests([path for path in tokenizer_files(directory) if path.name not in _UNREAD])


def _commit(directory: Path) -> Source:
    for folder in (directory, *directory.parents):
        if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
            return {"commit": folder.name}
    return {}
