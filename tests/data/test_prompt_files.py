"""Files of prompts in the field's formats: read to the same prompts, or refused in one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tracemalloc
import types

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from sbv2_jax.data.prompts import notes_of, open_prompts, prompt_batches
from sbv2_jax.data.text_prompts import TextPrompts
from sbv2_jax.errors import InputError

PROMPTS = ['a cat, "sitting"', "ein Bär; rot", "日本の猫", "two\nlines", "[a|b] (c:1.2)"]
READ = ['a cat, "sitting"', "ein Bär; rot", "日本の猫", "two lines", "[a|b] (c:1.2)"]
ROWS = [{"file_name": f"{i}.jpg", "caption": text, "width": i} for i, text in enumerate(PROMPTS)]
COCO = {
    "info": {"description": "COCO 2014 Dataset", "year": 2014},
    "licenses": [{"url": "http://x", "id": 1, "name": "text"}],
    "images": [{"file_name": "0.jpg", "id": 7, "height": 3}],
    "annotations": [{"image_id": 7, "id": i, "caption": text} for i, text in enumerate(PROMPTS)],
}


def table(delimiter: str, names=("file_name", "caption", "width"), rows=ROWS, newline="\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def json_lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(value, **how) -> bytes:
    return json.dumps(value, **how).encode()


def as_parquet(**columns) -> bytes:
    data = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), data, row_group_size=2)
    return data.getvalue()


def write(path, data) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def everything(source) -> list[str]:
    return [source[index] for index in range(len(source))]


FILES = {
    "comma": ("p.csv", table(",")),
    "byte order mark": ("p.csv", b"\xef\xbb\xbf" + table(",")),
    "CRLF": ("p.csv", table(",", newline="\r\n")),
    "semicolon, as European spreadsheets": ("p.csv", table(";")),
    "tabs": ("p.tsv", table("\t")),
    "upper case name": ("P.CSV", table(",").replace(b"caption", b"TEXT", 1)),
    "a list of strings": ("p.json", as_json(PROMPTS)),
    "a list of objects": ("p.json", as_json(ROWS, indent=2)),
    "COCO": ("captions_val2014.json", as_json(COCO)),
    "COCO, indented": ("captions_val2014.json", as_json(COCO, indent=1)),
    "an object with a list": ("p.json", as_json({"version": 2, "prompts": PROMPTS})),
    "pandas' columns": ("p.json", as_json({"caption": {str(i): text for i, text in enumerate(PROMPTS)}})),
    "kohya's captions": ("meta_cap.json", as_json({row["file_name"]: row for row in ROWS})),
    "objects, one a line": ("p.jsonl", json_lines(ROWS)),
    "strings, one a line": ("p.jsonl", json_lines(PROMPTS)),
    "lines under another name": ("p.json", json_lines(ROWS)),
    "JSON in a text file": ("p.txt", as_json(PROMPTS, indent=2)),
    "JSON without a suffix": ("prompts", as_json(ROWS)),
    "Parquet": ("p.parquet", as_parquet(caption=PROMPTS, width=list(range(5)))),
    "Parquet without a suffix": ("part-0", as_parquet(TEXT=PROMPTS)),
    "Parquet, lists": ("p.parquet", as_parquet(captions=[PROMPTS[:2], [], PROMPTS[2:], None])),
    "Parquet, dictionary": ("p.pq", as_parquet(text=pyarrow.array(PROMPTS).dictionary_encode())),
    "Parquet, binary": ("p.pq", as_parquet(text=[text.encode() for text in PROMPTS])),
    "text, CR": ("p.txt", "\r".join(READ).encode()),
    "text, CR and LF": ("p.txt", "\r\n".join(READ[:3]).encode() + b"\n" + "\r".join(READ[3:]).encode()),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gives_the_same_prompts(tmp_path, kind):
    name, data = FILES[kind]
    source = open_prompts(write(tmp_path / name, data))
    assert everything(source) == READ
    again = pickle.loads(pickle.dumps(source))
    assert everything(again) == READ and again.fingerprint() == source.fingerprint()
    with pytest.raises(IndexError):
        source[5]


ZSTD = pyarrow.Codec("zstd")
PACK = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: ZSTD.compress(data, asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("kind", ["comma", "COCO", "objects, one a line", "text, CR"])
def test_compressed_files_give_the_same_prompts(tmp_path, kind, ending):
    name, data = FILES[kind]
    if ending == ".zst":  # a frame that says no size, as the command writes it
        stream = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(stream, "zstd") as packer:
            packer.write(data)
        packed = stream.getvalue().to_pybytes()
    else:
        packed = PACK[ending](data)
    for named in (name + ending, name):  # its first bytes say that it is compressed
        assert everything(open_prompts(write(tmp_path / named, packed))) == READ
    with pytest.raises(
        InputError, match=r"not a whole (compressed )?file|not a whole compressed file"
    ) as caught:
        open_prompts(write(tmp_path / (name + ending), packed[: len(packed) // 2]))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_the_prompts_whatever_holds_them(tmp_path):
    found = {
        open_prompts(write(tmp_path / kind / name, data)).fingerprint()
        for kind, (name, data) in FILES.items()
        if not name.endswith(".txt") or kind == "JSON in a text file"
    }
    assert len(found) == 1
    other = write(tmp_path / "other.json", as_json([*PROMPTS[1:], PROMPTS[0]]))
    assert open_prompts(other).fingerprint() not in found


def test_the_column_is_guessed_and_told_or_named(tmp_path):
    rows = [{"caption": "a cat", "alt": "wrong", "tags": {"raw": ["x", "y"]}}]
    for name, data in {
        "p.csv": table(",", ("caption", "alt"), [{k: v for k, v in rows[0].items() if k != "tags"}]),
        "p.jsonl": json_lines(rows * 2),
        "p.json": as_json(rows),
        "p.parquet": as_parquet(caption=["a cat"], alt=["wrong"], tags=[{"raw": ["x", "y"]}]),
    }.items():
        path = write(tmp_path / name, data)
        source = open_prompts(path)
        assert set(everything(source)) == {"a cat"}
        (note,) = notes_of(source)
        assert note.startswith(f"{path}: the prompts are its column 'caption', of caption, alt")
        chosen = open_prompts(path, "alt")
        assert set(everything(chosen)) == {"wrong"} and notes_of(chosen) == ()
        with pytest.raises(InputError, match=r"no column 'captoin' .*did you mean caption\?"):
            open_prompts(path, "captoin")
        if name != "p.csv":
            assert everything(open_prompts(path, "tags.raw"))[:2] == ["x", "y"]
            with pytest.raises(InputError, match="no key 'row'|key 'row' of|column 'tags.row'"):
                open_prompts(path, "tags.row")
    coco = open_prompts(write(tmp_path / "coco.json", as_json(COCO)))
    assert "the prompts are its column 'annotations.caption', of annotations.image_id" in notes_of(coco)[0]
    named = open_prompts(write(tmp_path / "coco.json", as_json(COCO)), "annotations.caption")
    assert everything(named) == READ
    split = {"images": [{"sentences": [{"raw": "a"}, {"raw": "b"}]}, {"sentences": [{"raw": "c"}]}]}
    karpathy = write(tmp_path / "dataset_coco.json", as_json(split))
    assert everything(open_prompts(karpathy, "images.sentences.raw")) == ["a", "b", "c"]
    by_picture = write(tmp_path / "captions.json", as_json({"1.jpg": "a", "2.jpg": ["b", "c"]}))
    with pytest.raises(
        InputError, match=r"stands out among 1\.jpg, 2\.jpg: name it by --column .*; \* is every key"
    ):
        open_prompts(by_picture)
    assert everything(open_prompts(by_picture, "*")) == ["a", "b", "c"]


def test_a_table_by_another_name_is_no_text(tmp_path):
    flickr = write(tmp_path / "captions.txt", "image,caption\n1.jpg,A child .\n1.jpg,A girl .\n")
    with pytest.raises(InputError, match=r"captions\.txt: a table of image, caption, by its first rows"):
        open_prompts(flickr)
    assert everything(open_prompts(flickr, "caption")) == ["A child .", "A girl ."]
    for text in (
        "portrait, text, neon\na cat, sleeping\n",
        "text\ncat\n",
        "a cat,text\nb\n",
        "<lora:a:1> cat\n",
    ):
        assert len(open_prompts(write(tmp_path / "p.txt", text))) == 2 - text.startswith("<")
    syntax = ["[a|b]", "{a|b}", "[[a]]", "{{a}}", "[a:b:0.5]", "--- a", "(a)", '"a"']
    for line in syntax:
        assert everything(open_prompts(write(tmp_path / "p.txt", line + "\nsecond"))) == [line, "second"]


REFUSED = {
    "two columns that may be it": ("p.csv", b"text,caption\na,b\n", "columns text, caption may hold the prompts"),
    "no column that may be it": ("p.csv", b"file,alt\na,b\n", r"none of its columns file, alt is one of prompt,"),
    "no header": ("p.csv", b"a red apple\na dog\n", "none of its columns a red apple is one of"),
    "many columns": (
        "p.csv", (",".join(f"c{i}" for i in range(40)) + "\n").encode(), "c0, c1, .*c9 and 30 more is one of",
    ),
    "a comma without quotes": ("p.csv", b"id,caption\n1,a\n2,b, c\n", r"p\.csv, line 3: 3 fields, and its first"),
    "too few fields": ("p.csv", b"id,caption\n\n1,a\n2\n", r"line 4: 1 fields"),
    "a stray quote": ("p.csv", b'id,caption\n1,"a" b\n', r"line 2: not a row of a table: ',' expected"),
    "an open quote": ("p.tsv", b'id\tcaption\n1\t"a b\n2\tc\n', r"not a row of a table: unexpected end"),
    "not UTF-8": ("p.csv", b"id,caption\n1,a\n2,\xe4\n", r"p\.csv, line 3: not UTF-8"),
    "blank": ("p.csv", b"id,caption\n1,\n2, \n", "no prompts, only 2 blank ones"),
    "only a header": ("p.csv", b"id,caption\n", "no prompts, only 0 blank"),
    "empty": ("p.csv", b"", "none of its columns"),
    "half a list": ("p.json", b'["a",\n\n"b"', r"p\.json, line 3: not JSON: Expecting ',' delimiter"),
    "numbers": ("p.json", b"[1, 2]", "record 1: int '1', a prompt is a string"),
    "a number": ("p.json", b'{"caption": "a"}\n{"caption": 3}\n', "line 2: int '3', a prompt is a string"),
    "mixed": ("p.json", b'[{"text": "a"}, "b"]', "record 2: str, and others are objects"),
    "no list": ("config.json", b'{"steps": 3, "model": "x"}', "without a list of prompts that stands out among steps,"),
    "two lists": (
        "p.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "stands out among a, b: name it by --column",
    ),
    "a key that is not in each": ("p.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"line 2: no key 'text'"),
    "broken line": ("p.jsonl", b'{"text": "a"}\n{"text": \n', r"p\.jsonl, line 2: not JSON"),
    "a list a line": ("p.jsonl", b'["a"]\n["b"]\n', "line 1: neither an object nor a string"),
    "half a surrogate": ("p.json", b'["\\ud800"]', "record 1: not UTF-8"),
    "JSON in a text file that breaks": ("p.txt", b'[\n"a",\n"b"\n"c"]', r"p\.txt, line 4: not JSON"),
    "a notebook": ("p.ipynb", b'{"cells": []}', r"is a \.ipynb file, which is not read as prompts: give text,"),
    "YAML": ("p.yaml", b"- a cat\n- a dog\n", r"is a \.yaml file"),
    "Markdown": ("p.md", b"# Prompts\n\n- a cat\n", r"is a \.md file"),
    "HTML": ("p.txt", b"\n<!DOCTYPE html>\n<html>\n", "is HTML"),
    "XML": ("p", b'<?xml version="1.0"?>\n<a/>\n', "is XML"),
    "a ZIP archive": ("p.txt", b"PK\x03\x04 abc", r"is a ZIP archive \(or XLSX"),
    "a PDF": ("p.txt", b"%PDF-1.4\nabc\n", "is a PDF"),
    "a picture": ("p.txt", b"\x89PNG\r\n\x1a\n", "is a picture"),
    "an array": ("p.txt", b"\x93NUMPY\x01\0v\0{'descr': '<f4'}", "is a NumPy array"),
    "a pickle": ("p.txt", b"\x80\x04\x95abc", "is a pickle"),
    "zeros": ("p.txt", bytes(500) + b"\n", "is a binary file"),
    "a safetensors file": ("p.txt", b'\x10\0\0\0\0\0\0\0{"__metadata__": {}}', "is a safetensors file"),
    "a directory in Parquet's name": ("p.parquet", b"not one", "not a whole Parquet file"),
    "half a Parquet file": ("p.parquet", as_parquet(text=PROMPTS)[:-9], "not a whole Parquet file"),
    "a Parquet file in another": ("p.parquet.gz", gzip.compress(as_parquet(text=PROMPTS)), "unpack it first"),
    "numbers in Parquet": ("p.parquet", as_parquet(text=[1, 2]), "row 1: int '1', a prompt is a string"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_one_line(tmp_path, kind):
    name, data, message = REFUSED[kind]
    path = write(tmp_path / name, data)
    with pytest.raises(InputError, match=message) as caught:
        open_prompts(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_blank_prompts_of_a_table_are_left_out_and_counted(tmp_path):
    rows = [{"id": 1, "text": "a"}, {"id": 2, "text": None}, {"id": 3, "text": " "}, {"id": 4, "text": "b"}]
    for name, data in (
        ("p.csv", table(",", ("id", "text"), rows)),
        ("p.jsonl", json_lines(rows)),
        ("p.parquet", as_parquet(id=[1, 2, 3, 4], text=[row["text"] for row in rows])),
    ):
        source = open_prompts(write(tmp_path / name, data))
        assert everything(source) == ["a", "b"]
        assert notes_of(source)[1] == f"{tmp_path / name}: 2 blank prompts are left out"


def test_several_files_and_patterns_are_one_source(tmp_path, monkeypatch):
    for number, texts in enumerate([["a", "b"], ["c"], ["d", "e", "f"]]):
        write(tmp_path / f"part-{number}.parquet", as_parquet(text=texts))
    more = write(tmp_path / "more, or less.txt", "g\nh\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_prompts(f"~/part-*.parquet, {tmp_path}/part-1.parquet,openmoji:2")
    assert everything(source)[:7] == ["a", "b", "c", "d", "e", "f", "c"] and len(source) == 9
    assert everything(open_prompts("~/more, or less.txt")) == everything(open_prompts(more)) == ["g", "h"]
    batches = prompt_batches(source, 9, 0)
    assert sorted(next(batches)) == sorted(everything(source))
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    turned = open_prompts(f"{tmp_path}/part-1.parquet,{tmp_path}/part-0.parquet")
    straight = open_prompts(f"{tmp_path}/part-0.parquet,{tmp_path}/part-1.parquet")
    assert turned.fingerprint() != straight.fingerprint()
    with pytest.raises(IndexError):
        source[9]
    for wrong, message in {
        f"{tmp_path}/*.csv": r"\*\.csv: no file fits this pattern",
        f"{tmp_path}/part-0.parquet,{tmp_path}/none.txt": r"none\.txt: cannot be read.*No such file",
        f"{tmp_path}/part-0.parquet,": "a name of prompts is empty",
        f"{tmp_path}/pärt.txt": "No such file",
    }.items():
        with pytest.raises(InputError, match=message):
            open_prompts(wrong)


class Mine:
    """A source as a user writes one."""

    def __init__(self, count: int = 3):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        return f"mine {index}"

    def fingerprint(self) -> str:
        return f"mine/{self._count}"


def test_a_source_of_ones_own_is_named_by_its_dotted_path(monkeypatch):
    module = types.ModuleType("my_prompts")
    module.Source, module.Half, module.wrong = Mine, lambda: [], lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "my_prompts", module)
    assert everything(open_prompts("my_prompts:Source")) == ["mine 0", "mine 1", "mine 2"]
    source = open_prompts("my_prompts:Source:64")
    assert len(source) == 64 and len(set(next(prompt_batches(source, 64, 0)))) == 64
    for wrong, message in {
        "my_prompts:Half": "a prompt source has .*; this lacks fingerprint",
        "my_prompts:None_": "neither a file nor a prompt source: AttributeError",
        "my_prompts:wrong": "ZeroDivisionError",
        "no_such_module_here.at_all:Source": "ModuleNotFoundError",
        "opnemoji": "cannot be read as a prompt file",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            open_prompts(wrong)
        assert "\n" not in str(caught.value)
    for name in ("my_prompts:Source", "openmoji"):
        with pytest.raises(InputError, match="has no columns, and so no 'caption'"):
            open_prompts(name, "caption")


def test_cr_lines_agree_with_a_plain_reading_across_chunks(tmp_path):
    """Any mixture of the three ends, and lines longer than a chunk."""
    rng = np.random.default_rng(1)
    ends = [b"\n", b"\r", b"\r\n", b"\r\r", b"\n\r"]
    lines = [f"line {i} ".encode() + b"x" * int(rng.integers(0, 300)) for i in range(8_000)]
    lines[500] = b"y" * (2 << 20)
    data = b"".join(line + ends[int(rng.integers(5))] for line in lines)
    source = TextPrompts(write(tmp_path / "p.txt", data))
    expected = [" ".join(line.decode()[:4096].split()) for line in lines]
    assert everything(source) == expected
    packed = open_prompts(write(tmp_path / "p.txt.gz", gzip.compress(data, 1)))
    assert everything(packed) == expected
    bad = write(tmp_path / "bad.txt", b"a\rb\r\nc\n\xe4\r")
    for path in (bad, write(tmp_path / "bad.gz", gzip.compress(b"a\rb\r\nc\n\xe4\r"))):
        with pytest.raises(InputError, match="line 4: not UTF-8"):
            open_prompts(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz"])
@pytest.mark.slow
def test_many_rows_are_read_in_flat_memory(tmp_path, suffix):
    count = 60_000
    path = tmp_path / f"big{suffix}"
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(path, "wt") as file:
        if suffix == ".csv":
            file.write("id,caption\n")
            file.writelines(f'{i},"a small picture, number {i}"\n' for i in range(count))
        else:
            file.writelines(
                f'{{"id": {i}, "caption": "a small picture, number {i}"}}\n' for i in range(count)
            )
    tracemalloc.start()
    try:
        source = open_prompts(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == count and source[54_321] == "a small picture, number 54321"
    assert peak < 16e6, peak
    assert held < 1e6, held


def test_nothing_is_left_in_the_temporary_directory(tmp_path, monkeypatch):
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    source = open_prompts(write(tmp_path / "p.csv", table(",")))
    assert everything(source) == READ and not os.listdir(tmp_path / "tmp")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, kind in (("p.parquet", "Parquet"), ("p.txt.zst", "text, CR")):
        data = FILES[kind][1] if kind == "Parquet" else PACK[".zst"](FILES[kind][1])
        with pytest.raises(InputError, match=r"needs pyarrow: pip install \"sbv2_jax\[parquet\]\""):
            open_prompts(write(tmp_path / name, data))
