"""A tiny CLIP tokenizer, written in the layouts of Stable Diffusion 1 and 2."""

import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes, in CLIP's order, "!" first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer(directory: Path, family: int, max_length: int = 77) -> Path:
    """Writes a tiny CLIP tokenizer with the files, and the padding token, of Stable Diffusion `family`."""
    merges = ["a p", "ap p", "l e</w>", "app le</w>", "r e", "re d</w>", "d o", "do g</w>"]
    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]

    def added(content):
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"content": content, **flags}

    # As the hub's files are: for Stable Diffusion 2 it is the map alone that says what pads.
    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **added(START)},
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken", **added(END)},
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken", **added(END)},
    }
    special = {"bos_token": added(START), "eos_token": added(END), "unk_token": added(END)}
    special["pad_token"] = END if family == 1 else "!"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    return directory
