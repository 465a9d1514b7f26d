"""Prompt sources and the stream of batches: reading, refusing, resuming, memory."""

import itertools
import json
import os
import pickle
import tracemalloc

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tiny_tokenizer import write_tokenizer

from sbv2_jax.data.prompts import describe_cut, open_prompts, prompt_batches
from sbv2_jax.data.text_prompts import TextPrompts
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import TokenizerPair, load_tokenizer


def write(path, data) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def everything(source) -> list[str]:
    return [source[index] for index in range(len(source))]


def take(count: int, *args, **kwargs) -> list[list[str]]:
    return list(itertools.islice(prompt_batches(*args, **kwargs), count))


@pytest.fixture
def numbered(tmp_path) -> TextPrompts:
    return open_prompts(write(tmp_path / "p.txt", "".join(f"prompt {i}\n" for i in range(23))))


def test_text_lines_bom_crlf_blanks_and_unicode(tmp_path):
    text = "\ufeffa cat\r\n\r\n   \t\r\nein Bär\nпривет мир\n\u3000\u200b\n日本の猫\nlast"
    source = open_prompts(write(tmp_path / "p.txt", text))
    assert everything(source) == ["a cat", "ein Bär", "привет мир", "日本の猫", "last"]
    with pytest.raises(IndexError):
        source[5]
    again = pickle.loads(pickle.dumps(source))
    assert everything(again) == everything(source)


def test_control_and_bidi_characters_are_dropped(tmp_path):
    text = "a\0 red\x1b[31m\tapple\u202egnp\u2066\n\0\u202e\n\u061cx\x85y \u200d🏽\n"
    source = open_prompts(write(tmp_path / "p.txt", text))
    assert everything(source) == ["a red[31m applegnp", "x y \u200d🏽"]


def test_index_agrees_with_a_plain_reading(tmp_path):
    """Blank lines anywhere between the indexed ones, and more than one chunk of the file."""
    kinds = [b"plain %d", b"", b"  "]
    kinds += [text.encode() for text in ("drei Bären %d", "\u3000", "猫 %d")]
    lines = [kinds[(i * i + i // 7) % len(kinds)] for i in range(9000)]
    lines = [line % i if b"%d" in line else line for i, line in enumerate(lines)]
    lines[4000] = b"x" * (3 << 20)  # longer than a chunk
    source = TextPrompts(write(tmp_path / "p.txt", b"\n".join(lines)))
    expected = [line.decode()[:4096].strip() for line in lines]
    assert everything(source) == [line for line in expected if line]


def test_a_ten_megabyte_line_is_cut_at_a_character(tmp_path):
    source = open_prompts(write(tmp_path / "p.txt", "first\n" + "aß猫" * 1_700_000 + "\nlast\n"))
    long = source[1]
    assert len(source) == 3 and source[2] == "last"
    assert len(long.encode()) in range(4092, 4097) and ("aß猫" * 2000).startswith(long)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "no prompts, only 0 blank lines"),
        (b"\n \n\t\n", "no prompts, only 3 blank lines"),
        (b"good\nfine\nb\xe4d\n", r"p\.txt, line 3: not UTF-8"),
        ("häuser\n".encode() * 200_000 + b"\xc3\n", r"p\.txt, line 200001: not UTF-8"),
        ("a\nb\n".encode("utf-16"), "line 1: not UTF-8"),
        (b"cut short \xe7\x8c", "line 1: not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as caught:
        open_prompts(write(tmp_path / "p.txt", data))
    assert "\n" not in str(caught.value)


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: cannot be read.*No such file"):
        open_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="a directory without array_record files"):
        open_prompts(tmp_path)


def test_prompts_that_are_cut_are_told_in_one_line(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", 2, max_length=8))
    assert describe_cut(["dog " * 6, "red apple"], tokenizer) is None
    line = "2 of 3 prompts are longer than 8 tokens and are cut"
    assert describe_cut(["dog " * 7, "dog", "dog " * 40], tokenizer) == line
    assert describe_cut(["dog " * 7, "dog", "dog " * 40], TokenizerPair(tokenizer, tokenizer)) == line
    source = open_prompts(
        write(tmp_path / "p.txt", "".join("dog " * (i % 10 + 1) + "\n" for i in range(300)))
    )
    monkeypatch.setattr("sbv2_jax.data.prompts._COUNTED", 100)
    assert describe_cut(source, tokenizer) == (
        "40 of 100 prompts looked at, of 300, are longer than 8 tokens and are cut"
    )


def test_fingerprint_is_of_the_content(tmp_path):
    one = open_prompts(write(tmp_path / "a.txt", "x\ny\n")).fingerprint()
    assert one == open_prompts(write(tmp_path / "b.txt", "x\ny\n")).fingerprint()
    assert one != open_prompts(write(tmp_path / "a.txt", "y\nx\n")).fingerprint()
    long = "z" * (3 << 20)
    assert (
        open_prompts(write(tmp_path / "c.txt", long + "\nq")).fingerprint()
        != open_prompts(write(tmp_path / "c.txt", long + "\nr")).fingerprint()
    )


def test_every_epoch_is_a_new_permutation(numbered):
    batches = take(23, numbered, 4, 7)
    assert all(type(batch) is list and len(batch) == 4 for batch in batches)
    stream = list(itertools.chain(*batches))
    epochs = [stream[i : i + 23] for i in range(0, 92, 23)]
    assert all(sorted(epoch) == sorted(everything(numbered)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(2, numbered, 4, 8) != batches[:2]


@pytest.mark.parametrize("stop", [1, 5, 6, 11, 12, 40])
def test_resume_joins_the_uninterrupted_stream_across_epochs(numbered, stop):
    straight = take(48, numbered, 4, 7)
    assert take(stop, numbered, 4, 7) + take(48 - stop, numbered, 4, 7, start_step=stop) == straight


def test_any_number_of_processes_gives_the_same_global_batches(numbered):
    straight = take(14, numbered, 12, 3)
    for count in (1, 2, 3, 4, 6, 12):
        parts = [take(9, numbered, 12, 3, 5, index, count, prefetch=index % 3) for index in range(count)]
        joined = [sum(rows, []) for rows in zip(*parts, strict=True)]
        assert joined == straight[5:], count


def test_too_few_prompts_and_uneven_processes_are_refused(numbered):
    with pytest.raises(InputError, match=r"23 prompts\): fewer prompts than the batch size 24"):
        prompt_batches(numbered, 24, 0)
    with pytest.raises(InputError, match="batch_size 8: not divisible by the 3 processes"):
        prompt_batches(numbered, 8, 0, process_count=3)


def records(path, texts, options="group_size:1") -> str:
    writer = ArrayRecordWriter(str(path), options)
    for text in texts:
        writer.write(text.encode())
    writer.close()
    return str(path)


def test_array_records_are_read_and_broken_ones_named(tmp_path):
    path = records(tmp_path / "p.array_record", [f"prompt {i}" for i in range(100)])
    source = open_prompts(path)
    assert len(source) == 100 and source[42] == "prompt 42"
    assert open_prompts(tmp_path).fingerprint() == source.fingerprint()
    data = bytearray((tmp_path / "p.array_record").read_bytes())
    with pytest.raises(InputError, match="not a whole array_record file"):
        open_prompts(write(tmp_path / "short.array_record", bytes(data[:-10])))
    data[1200:1260] = bytes(60)
    broken = open_prompts(write(tmp_path / "broken.array_record", bytes(data)))
    with pytest.raises(InputError, match=r"broken\.array_record, record \d+: Corrupted"):
        everything(broken)
    blank = open_prompts(records(tmp_path / "blank.array_record", ["a", " "]))
    with pytest.raises(InputError, match="record 1: a blank prompt"):
        everything(blank)


INFO = {"fileFormat": "array_record", "splits": [{"name": "train"}]}


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("{", r"dataset_info\.json is not readable JSON"),
        ("[]", r"dataset_info\.json holds list, an object was expected"),
        ({"fileFormat": "tfrecord"}, "in another format"),
        ({"fileFormat": "array_record"}, r"dataset_info\.json names no splits"),
        (INFO | {"splits": ["train"]}, r"dataset_info\.json names no splits"),
        (INFO | {"splits": [{"name": "test"}]}, "no split 'train': it has test"),
        (INFO, "its split 'train' has no array_record files"),
    ],
)
def test_a_broken_tfds_directory_is_one_line(tmp_path, info, message):
    write(tmp_path / "dataset_info.json", info if isinstance(info, str) else json.dumps(info))
    with pytest.raises(InputError, match=message) as caught:
        open_prompts(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("features", [None, "{", "{}"])
def test_the_features_of_a_tfds_directory_are_named_when_they_cannot_be_read(tmp_path, features):
    records(tmp_path / "d-train.array_record-00000-of-00001", ["x"])
    write(tmp_path / "dataset_info.json", json.dumps(INFO))
    if features is not None:
        write(tmp_path / "features.json", features)
    with pytest.raises(InputError, match=r"features\.json") as caught:
        open_prompts(tmp_path)
    assert "\n" not in str(caught.value)


def test_openmoji_captions_by_name():
    from sbv2_jax.openmoji.world import caption

    source = open_prompts("openmoji:64")
    assert len(source) == 64 and source[9] == caption("train", 9)
    assert sorted(sum(take(8, source, 8, 0), [])) == sorted(everything(source))
    assert len(open_prompts("openmoji")) == 50_000


def test_two_million_lines_in_flat_memory(tmp_path):
    path = tmp_path / "big.txt"
    with open(path, "w") as file:
        for part in range(20):
            file.writelines(f"a small picture of number {part * 100_000 + i}\n" for i in range(100_000))
    assert os.path.getsize(path) > 60e6
    tracemalloc.start()
    try:
        source = open_prompts(path)
        held, peak = tracemalloc.get_traced_memory()
        batch = next(prompt_batches(source, 64, 0, start_step=1000))
    finally:
        tracemalloc.stop()
    assert len(source) == 2_000_000 and source[1_234_567].endswith(" 1234567")
    assert len(set(batch)) == 64
    assert peak < 8e6, peak
    assert held < 3e6, held
