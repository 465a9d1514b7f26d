"""The tokenizer, on a tiny vocabulary written in the layouts of Stable Diffusion 1 and 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from tiny_tokenizer import END, START, write_tokenizer

from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import load_tokenizer


def ids(tokenizer_directory: Path, *tokens: str) -> list[int]:
    vocabulary = json.loads((tokenizer_directory / "vocab.json").read_text())
    return [vocabulary[token] for token in tokens]


@pytest.mark.parametrize("family", [1, 2])
def test_prompts_are_encoded_and_padded_as_the_family_does(tmp_path, family):
    directory = write_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(directory)
    start, end, red, apple = ids(directory, START, END, "red</w>", "apple</w>")
    pad = end if family == 1 else 0
    assert (tokenizer.max_length, tokenizer.pad_token_id, tokenizer.eos_token_id) == (77, pad, end)
    assert tokenizer.vocab_size == end + 1

    out = tokenizer.encode(["Red  APPLE", ""])
    assert out.dtype == np.int32 and out.shape == (2, 77)
    assert out[0].tolist() == [start, red, apple, end] + [pad] * 73
    assert out[1].tolist() == [start, end] + [pad] * 75
    assert tokenizer.encode([]).shape == (0, 77)


def test_long_prompts_are_cut_and_counted(tmp_path):
    directory = write_tokenizer(tmp_path, 2, max_length=8)
    tokenizer = load_tokenizer(directory)
    start, end, dog = ids(directory, START, END, "dog</w>")
    prompts = ["dog " * 6, "dog " * 7, "dog " * 100, ""]
    out = tokenizer.encode(prompts)
    for row in out[:3]:
        assert row.tolist() == [start] + [dog] * 6 + [end]
    assert tokenizer.count_truncated(prompts) == 2
    assert tokenizer.count_truncated([]) == 0
    # Counting leaves no truncation or padding behind in the backend.
    np.testing.assert_array_equal(tokenizer.encode(prompts), out)


@pytest.mark.parametrize("family", [1, 2])
def test_the_layout_that_transformers_5_writes_gives_the_same_ids(tmp_path, family):
    old = write_tokenizer(tmp_path / "old", family)
    transformers.CLIPTokenizer.from_pretrained(old).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    prompts = ["a red apple, 'quoted'!", "Ünïcode 🦊 dog 42", "", "dog " * 90]
    before, after = load_tokenizer(old), load_tokenizer(tmp_path / "new")
    assert before == after
    np.testing.assert_array_equal(before.encode(prompts), after.encode(prompts))


def test_it_works_without_torch_and_without_network(tmp_path):
    directory = write_tokenizer(tmp_path, 1)
    program = f"""
import sys, socket
sys.modules["torch"] = None  # makes every import of torch fail
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from sbv2_jax.models.tokenizer import load_tokenizer
print(load_tokenizer({str(directory)!r}).encode(["red apple"])[0, :4].tolist())
"""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ids(directory, START, "red</w>", "apple</w>", END)


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_missing_file_is_named(tmp_path, name):
    directory = write_tokenizer(tmp_path, 2)
    (directory / name).unlink()
    with pytest.raises(InputError, match=str(directory / name)):
        load_tokenizer(directory)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path / "nowhere")):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizer_class", "T5Tokenizer"), ("model_max_length", int(1e30)), ("model_max_length", None)],
)
def test_a_wrong_field_is_named(tmp_path, field, value):
    directory = write_tokenizer(tmp_path, 1)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=f"{path}: {field}="):
        load_tokenizer(directory)


@pytest.mark.parametrize(("name", "content"), [("tokenizer_config.json", "{"), ("vocab.json", "[1]")])
def test_an_unreadable_file_is_one_clear_error(tmp_path, name, content):
    directory = write_tokenizer(tmp_path, 1)
    (directory / name).write_text(content)
    with pytest.raises(InputError, match=str(directory)):
        load_tokenizer(directory)


def test_one_string_is_not_a_list_of_prompts(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, 1))
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer.encode("a red apple")
