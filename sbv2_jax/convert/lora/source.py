"""From what a user names a LoRA by (a file, a folder, a hub id, with a strength) to its file and its settings."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from sbv2_jax.convert.formats.files import parse_json, read_json
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.convert.formats.safetensors_io import PICKLE_SUFFIXES
from sbv2_jax.convert.lora.settings import Settings, check
from sbv2_jax.errors import InputError, listed

PEFT_FILE = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"


class Request(NamedTuple):
    """A LoRA as the command line names it: where it is, and the factor it is added with."""

    source: str
    strength: float = 1.0


def parse_request(text: str) -> Request:
    """Splits `SOURCE[:STRENGTH]`, such as `style.safetensors:0.7`; raises InputError for a strength that is none."""
    source, colon, strength = text.rpartition(":")
    if not colon or Path(text).expanduser().exists() or "/" in strength or "\\" in strength:
        return Request(text)
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{text}: the strength {strength!r} is not a finite number")
    return Request(source, value)


def find_file(source: str | Path) -> Path:
    """Returns the safetensors file of a LoRA: the file itself, or that of a folder or of a hub id.

    Of a folder it is PEFT's `adapter_model.safetensors`, diffusers' `pytorch_lora_weights.safetensors`, or the
    only one there is. Raises InputError as `resolve` does, and for a folder with no such file or with several.
    """
    path = Path(source).expanduser()
    if path.suffix in (".safetensors", *PICKLE_SUFFIXES) or path.is_file():
        return path
    directory = resolve(source, stems=(Path(PEFT_FILE).stem, Path(_DIFFUSERS_FILE).stem))
    for name in (PEFT_FILE, _DIFFUSERS_FILE):
        if (directory / name).exists():
            return directory / name
    if directory != path:  # from the hub; most there are called as their authors like
        directory = resolve(source, stems=("",))
    names = sorted(one.name for one in directory.iterdir() if one.suffix == ".safetensors")
    if len(names) == 1:
        return directory / names[0]
    if names:
        raise InputError(f"{directory} has several files: name one of them, {listed(names, ', ')}")
    pickles = sorted(one.name for one in directory.iterdir() if one.suffix in PICKLE_SUFFIXES)
    only = f", but pickles ({listed(pickles, ', ')}), which can run code" if pickles else ""
    raise InputError(f"{directory} has no safetensors file{only}")


def read_settings(path: Path, peft: bool) -> dict[str, list[Settings]]:
    """Returns what is said of each network's LoRA: in the file's metadata, and, of a `peft` file, beside it.

    What stands beside it is of one network, here "". Raises InputError for what is not supported.
    """
    found: dict[str, dict[str, Any]] = {}
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(METADATA)
    values: Mapping[str, Any] = {}
    if text is not None:
        values = parse_json(text.encode(), f"the {METADATA} of {path}")
    for name, value in values.items():
        part, dot, setting = name.partition(".")
        found.setdefault(part if dot else "unet", {})[setting if dot else name] = value
    settings = {part: [Settings(f"the metadata of {path}", one)] for part, one in found.items()}
    config = path.with_name(_PEFT_CONFIG)
    if peft and config.exists():
        settings.setdefault("", []).append(Settings(str(config), read_json(config)))
    for several in settings.values():
        for one in several:
            check(one)
    return settings
