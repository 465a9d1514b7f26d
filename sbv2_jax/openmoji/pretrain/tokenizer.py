"""A CLIP tokenizer of its own for a small world: byte-level BPE, written as the hub's files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sbv2_jax.convert.formats.files import new_directory, write_json

_START, _END, _SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(
    captions: Iterable[str], directory: str | Path, *, vocab_size: int, max_length: int
) -> None:
    """Writes a tokenizer directory that transformers' CLIPTokenizer and `load_tokenizer` read.

    The vocabulary is laid out as OpenAI's: the 256 bytes, the 256 bytes that end a word, the merges, the two
    special tokens; so any text can be encoded. It pads with the end token, as Stable Diffusion 1 does, to
    `max_length` tokens. Raises InputError where the directory is not empty or cannot be written.
    """
    merges = _merges(captions, vocab_size)
    alphabet = _alphabet()
    tokens = [*alphabet, *(byte + _SUFFIX for byte in alphabet), *(a + b for a, b in merges), _START, _END]
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
    with new_directory(directory) as partial:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        text = json.dumps(vocabulary, ensure_ascii=False) + "\n"
        (partial / "vocab.json").write_text(text, encoding="utf-8")
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
        (partial / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(partial / "tokenizer_config.json", config)
        write_json(partial / "special_tokens_map.json", special)


def _merges(captions: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    # Words are to be cut as the reader will cut them, so its own normaliser and splitter do it.
    reader: Any = CLIPTokenizer()._tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX))
    tokenizer.normalizer, tokenizer.pre_tokenizer = reader.normalizer, reader.pre_tokenizer
    trainer = trainers.BpeTrainer(
        # The trainer counts only those word ends that occur; the vocabulary holds all 256, and two specials.
        vocab_size=vocab_size,
        initial_alphabet=_alphabet(),
        end_of_word_suffix=_SUFFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    known = len(_alphabet()) * 2 + 2
    return [tuple(pair) for pair in merges][: vocab_size - known]


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
