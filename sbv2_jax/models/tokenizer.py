"""Prompts to token ids, by the tokenizer's own files; no PyTorch and no network."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sbv2_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from sbv2_jax.models.clip import CLIPTextConfig


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A CLIP tokenizer; `load_tokenizer` makes one.

    `max_length` is the length of every encoded prompt, start and end tokens included. `pad_token_id` differs
    between the families: Stable Diffusion 1 pads with the end token, 2 with token 0. `vocab_size` is one more than
    the largest id that a prompt may have.
    """

    max_length: int
    pad_token_id: int
    eos_token_id: int
    vocab_size: int
    _backend: "CLIPTokenizer" = dataclasses.field(repr=False, compare=False)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns the token ids [B, max_length], int32; what is longer is cut, an empty prompt is allowed."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, not one string")
        if not prompts:
            return np.zeros((0, self.max_length), np.int32)
        ids = self._backend(
            list(prompts), padding="max_length", max_length=self.max_length, truncation=True, verbose=False
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """Returns how many of the prompts `encode` cuts."""
        if not prompts:
            return 0
        ids = self._backend(list(prompts), verbose=False)["input_ids"]
        return sum(len(row) > self.max_length for row in ids)


@dataclasses.dataclass(frozen=True)
class TokenizerPair:
    """SDXL's two tokenizers, which give every prompt to both of its text towers; they pad differently.

    Raises InputError where their lengths differ.
    """

    first: Tokenizer
    second: Tokenizer

    def __post_init__(self) -> None:
        if self.first.max_length != self.second.max_length:
            raise InputError(
                f"the tokenizers give {self.first.max_length} and {self.second.max_length} tokens a prompt; "
                "their text towers take the same number"
            )

    @property
    def max_length(self) -> int:
        """The length of every encoded prompt."""
        return self.first.max_length

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """Returns how many of the prompts `encode` cuts; the two differ in what they pad with alone."""
        return self.first.count_truncated(prompts)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns the token ids [B, 2, max_length], int32, as `Tokenizer.encode` does."""
        return np.stack([self.first.encode(prompts), self.second.encode(prompts)], axis=1)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads a pipeline's `tokenizer` directory, in the layout of transformers 4 or 5.

    Raises InputError for a missing file, a tokenizer that is not CLIP's, or one without a maximum length.
    """
    directory = Path(directory)
    config_path = directory / "tokenizer_config.json"
    # special_tokens_map.json overrides the padding token of tokenizer_config.json, and for Stable Diffusion 2
    # it must: without that file its prompts would be padded differently, in silence.
    layout = ["vocab.json", "merges.txt", "special_tokens_map.json"]
    if (directory / "tokenizer.json").is_file():
        layout = []
    missing = [name for name in [config_path.name, *layout] if not (directory / name).is_file()]
    if missing:
        raise InputError("missing tokenizer files: " + ", ".join(str(directory / name) for name in missing))

    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config_path}: {error}") from error
    kind, max_length = config.get("tokenizer_class", "CLIPTokenizer"), config.get("model_max_length")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise InputError(f"{config_path}: tokenizer_class={kind!r} is not supported (only 'CLIPTokenizer')")
    # Without a limit transformers writes 1e30.
    if not isinstance(max_length, int) or not 2 < max_length < 10**6:
        raise InputError(f"{config_path}: model_max_length={max_length!r} is not a number of tokens")

    from transformers import CLIPTokenizer

    try:
        backend = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise whatever the parsing met
        raise InputError(f"{directory} does not hold a readable CLIP tokenizer: {error}") from error
    largest = max(backend.get_vocab().values(), default=-1)
    return Tokenizer(max_length, backend.pad_token_id, backend.eos_token_id, largest + 1, backend)


def load_fitting(directory: str | Path, config: "CLIPTextConfig") -> Tokenizer:
    """Reads the tokenizer of a text tower.

    Raises InputError as `load_tokenizer` does, and where its prompts are longer than the tower's positions or its
    tokens more than the tower has embeddings: such a prompt would be drawn black, or not at all.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer.max_length > config.max_position_embeddings:
        raise InputError(
            f"{Path(directory) / 'tokenizer_config.json'}: model_max_length={tokenizer.max_length}, and the text "
            f"encoder has max_position_embeddings={config.max_position_embeddings}: lower the first"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{directory} has tokens up to {tokenizer.vocab_size - 1}, and the text encoder embeddings of "
            f"{config.vocab_size}: a tokenizer and a text encoder of one model are needed"
        )
    return tokenizer
