"""From what the user names a model by (a directory, a hub id, `bundled`) to a directory."""

import re
from collections.abc import Sequence
from pathlib import Path

from sbv2_jax.convert.formats.files import existing_directory
from sbv2_jax.convert.formats.single_file import directory_of
from sbv2_jax.errors import InputError

_BUNDLED = Path(__file__).parents[2] / "openmoji" / "bundled"
_SINGLE_FILE = re.compile(r"(?P<file>.+\.(?:safetensors|ckpt|pt|pth|bin))(?:@(?P<base>.+))?")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?")
# Weights by the names of the libraries: many repositories have whole pipelines in one file at their root too.
_STEMS = ("model", "diffusion_pytorch_model")
_UNWANTED = ["safety_checker/*", "*.non_ema.safetensors", "*non_ema-*"]


def resolve(path_or_id: str | Path, stems: Sequence[str] = _STEMS) -> Path:
    """Returns the directory of a model.

    The word `bundled` is the pipeline that the package carries. An existing directory is taken as it is.
    `FILE.safetensors@BASE` is a checkpoint in one file, with what it lacks from the pipeline BASE; without a BASE it
    stands for its UNet (`single_file.directory_of`).
    Anything else that looks like a path is an InputError that names it: the network is not touched.
    `owner/name`, or `owner/name@revision`, is fetched from the hub into its cache (JSON and text files, and the
    safetensors files whose names begin with one of `stems`), or found there when offline; a failure is an
    InputError of one line.
    """
    if path_or_id == "bundled":
        if not (_BUNDLED / "model_index.json").is_file():
            raise InputError(f"the bundled pipeline is missing from this installation ({_BUNDLED})")
        return _BUNDLED
    match = _SINGLE_FILE.fullmatch(str(path_or_id))
    if match and not _is_directory(path_or_id):
        return directory_of(match["file"], resolve(match["base"]) if match["base"] else None)
    path = Path(path_or_id).expanduser()
    if not str(path_or_id).strip():
        raise InputError("the name of a model is empty")
    if isinstance(path_or_id, Path) or _exists(path):
        return existing_directory(path)
    if path_or_id.startswith((".", "/", "~")):
        raise InputError(f"{path_or_id} does not exist")
    match = _HUB_ID.fullmatch(path_or_id)
    if match is None:
        raise InputError(f"{path_or_id} does not exist, and is no hub id (owner/name)")
    # "runs/first" next to a directory "runs" is a path that was mistyped.
    if _exists(path.parent):
        raise InputError(f"{path_or_id} does not exist (there is {path.parent}/, so the hub was not asked)")
    return _from_hub(match["id"], match["revision"], stems)


def is_single_file(name: str | Path) -> bool:
    """Whether what has this name is a checkpoint in one file, named without a base."""
    match = _SINGLE_FILE.fullmatch(str(name))
    return match is not None and match["base"] is None and not _is_directory(name)


def _is_directory(name: str | Path) -> bool:
    path = Path(name).expanduser()
    return _exists(path) and path.is_dir()


def is_hub_id(name: str) -> bool:
    """Whether `resolve` would ask the hub for what has this name."""
    path = Path(name).expanduser()
    return bool(_HUB_ID.fullmatch(name)) and not _exists(path) and not _exists(path.parent)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a NUL
        return False


def _from_hub(repository: str, revision: str | None, stems: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    weights = [f"{folder}{stem}*.safetensors" for folder in ("", "*/") for stem in stems]
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "*.txt", *weights],
                ignore_patterns=_UNWANTED,
            )
        )
    except Exception as error:  # the hub client raises its own errors, the HTTP client's and the system's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{repository} is no local directory, and could not be fetched from the hub: {reason[:300]}"
        ) from error
