"""Files and directories of models: read with suspicion, written whole or not at all."""

import collections
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbv2_jax.errors import InputError

_MAX_JSON_BYTES = 64 * 2**20


def existing_directory(path: str | Path) -> Path:
    """Returns the path of a directory; raises InputError where there is none."""
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a directory" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}")
    return path


def file_of(directory: Path, name: str) -> Path:
    """Returns the path of a file that lies in a directory itself.

    A user's own symbolic links are followed, wherever they lead. Raises InputError for a missing file, a name that is
    more than a name, and a link that leads out of a repository that was downloaded (`require_own_link`).
    """
    if not name or name != os.path.basename(name) or name in (".", "..") or "\\" in name or "\0" in name:
        raise InputError(f"{directory}: {name!r} is not the name of a file in this directory")
    path = directory / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        broken = path.is_symlink()
        raise InputError(f"{path} {'is a broken link' if broken else 'does not exist'}") from error
    require_own_link(path)
    if not real.is_file():
        raise InputError(f"{path} is not a file")
    return path


def require_own_link(path: Path) -> None:
    """Raises InputError for a symbolic link that came with a downloaded repository and leads out of it.

    Whoever wrote such a repository does not say which of the user's files are read. Allowed is the link that the
    cache of the hub consists of: `models--owner--name/snapshots/<revision>/[folder/]file` to
    `models--owner--name/blobs/<hash>`, wherever the user keeps the cache and its blobs.
    """
    parent = path.parent.resolve()
    repository = _downloaded(parent)
    if not path.is_symlink() or repository is None:
        return
    target = Path(os.path.normpath(parent / os.readlink(path)))
    if path.resolve().is_relative_to(repository) or _is_blob(repository, target):
        return
    raise InputError(
        f"{path} is a symbolic link out of the repository {repository} that it was downloaded with, to {target}: "
        "put a copy in its place if it is yours"
    )


def _downloaded(directory: Path) -> Path | None:
    """Returns the root of the downloaded repository that a directory, without links in its path, lies in.

    That is a snapshot in the cache of the hub, or else a clone, or what the hub's client put into a folder: of these
    the directory itself or the one above it, since a user's own work may lie in a clone of something else.
    """
    for root in (directory, *directory.parents):
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            return root
    marks = (".git", ".gitattributes", ".cache/huggingface/download")
    return next(
        (root for root in (directory, directory.parent) if any((root / mark).exists() for mark in marks)),
        None,
    )


def _is_blob(repository: Path, target: Path) -> bool:
    cache = repository.parent.parent
    is_hash = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", target.name)
    return repository.parent.name == "snapshots" and bool(is_hash) and target.parent == cache / "blobs"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file; raises InputError that names the file, also for a key given twice."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """Returns the object of a JSON text; raises InputError, starting with `source`, as `read_json` does."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            twice = [ascii(name) for name, times in counts.items() if times > 1]
            raise InputError(f"{source} gives the same key twice: {', '.join(twice[:10])}")
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{source} holds {type(values).__name__}, an object was expected")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object as the libraries of the hub do: indented, sorted, with a line end."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Gives a directory to write in, which becomes `directory` in one rename if nothing fails.

    Raises InputError where `directory` exists and is not empty, or cannot be written (a full disk included);
    nothing is left behind then.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; nothing was written")
    if directory.is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty; nothing was written")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or error}") from error
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp's are private
        os.rename(partial, directory)  # replaces an empty directory, fails on any other
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Gives a path to write a file at, which becomes `path` in one rename if nothing fails.

    Raises InputError where `path` exists or cannot be written; nothing is left behind then.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path):
        raise InputError(f"{path} exists; nothing was written")
    with replaced_file(path) as partial:
        yield partial


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Gives a path to write a file at, which takes the place of `path`, if there is one, in one rename.

    Raises InputError where it cannot be written; what was there stays then.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # where a folder of it is a file, there is nothing
            partial.unlink()
