"""The files of a model that hold no weights: its tokenizer, and how a CLIP takes its pictures."""

import shutil
from pathlib import Path

from sbv2_jax.convert.formats.files import existing_directory, file_of, write_json
from sbv2_jax.errors import InputError
from sbv2_jax.models.clip_image import CLIPImageConfig

PREPROCESSOR = "preprocessor_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def tokenizer_files(directory: str | Path) -> list[Path]:
    """Returns the files of a tokenizer; raises InputError where the directory does not hold one."""
    directory = existing_directory(directory)
    found = [file_of(directory, name) for name in _TOKENIZER if (directory / name).exists()]
    names = {path.name for path in found}
    if "tokenizer_config.json" not in names or not names & {"tokenizer.json", "vocab.json"}:
        raise InputError(f"{directory} does not hold a tokenizer")
    return found


def copy_clip_files(source: Path, directory: Path) -> None:
    """Copies what lies beside the weights of a CLIP: `preprocessor_config.json` and its tokenizer, if any."""
    for name in (PREPROCESSOR, *_TOKENIZER):
        if (source / name).exists():
            shutil.copyfile(file_of(source, name), directory / name)


def write_preprocessor(directory: Path, config: CLIPImageConfig) -> None:
    """Writes the `preprocessor_config.json` of a CLIP."""
    write_json(directory / PREPROCESSOR, config.to_dict())
