"""Strict reading of safetensors: what is refused, mutated files, and the bytes that are written."""

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file
from some_tensors import STEM, infos, tensors

from sbv2_jax.convert.formats.files import file_of, new_directory, parse_json, read_json
from sbv2_jax.convert.formats.safetensors_io import DTYPES, read_header, read_tensors, write_file
from sbv2_jax.convert.formats.weight_files import open_weights
from sbv2_jax.errors import InputError


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int = 0, end: int = 4, **changes) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, end], **changes}


class Canary:
    """A pickle of it touches a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_the_bytes_written_are_those_of_the_library(tmp_path, rng):
    arrays = tensors(rng)
    write_file(tmp_path / "x.safetensors", infos(arrays), arrays.__getitem__)
    assert (tmp_path / "x.safetensors").read_bytes() == save(arrays, metadata={"format": "pt"})


def test_what_is_read_is_what_was_written(tmp_path, rng):
    arrays = tensors(rng)
    path = tmp_path / "x.safetensors"
    save_file(arrays, path)
    header = read_header(path)
    assert {name: info[:2] for name, info in header.items()} == {n: i[:2] for n, i in infos(arrays).items()}
    mapped, read = (dict(read_tensors(path, header, mapped=mapped)) for mapped in (True, False))
    path.unlink()  # or another file in its place, as every careful program writes
    for found in (mapped, read):
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()
    assert not mapped["a.weight"].flags.writeable and read["a.weight"].flags.writeable


def test_a_file_that_is_not_aligned_is_read_as_well(tmp_path, rng):
    arrays = tensors(rng)
    path = tmp_path / "x.safetensors"
    whole = save(arrays)
    length = struct.unpack("<Q", whole[:8])[0]
    for spaces in range(1, 8):
        path.write_bytes(raw(whole[8 : 8 + length] + b" " * spaces, whole[8 + length :]))
        for name, array in read_tensors(path, read_header(path), mapped=True):
            assert array.tobytes() == arrays[name].tobytes() and array.flags.aligned


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": %(e)s, "a": %(e)s}', "same key twice: 'a'"),
        (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', "twice: 'dtype'"),
        ({"../../etc/passwd": entry()}, "unsafe names.*passwd"),
        ({"a..b": entry()}, "unsafe names"),
        ({"/etc/passwd": entry()}, "unsafe names"),
        ({"\\\\host\\share": entry()}, "unsafe names"),
        ({"a\0b": entry()}, r"unsafe names.*a\\x00b"),
        ({"a\x1b[31m": entry()}, r"unsafe names.*\\x1b"),
        ({"": entry()}, "unsafe names"),
        ([1, 2], "holds list"),
        (b"\xff\xfe", "not readable JSON"),
        (b"{" * 100_000, "not readable JSON"),
        ({"a": entry(end=8)}, "not a sound safetensors file"),
        ({"a": entry(end=2)}, "not a sound safetensors file"),
        ({"a": entry(start=4, end=0)}, "not a sound safetensors file"),
        ({"a": entry(shape=[2**40, 2**40])}, "not a sound safetensors file"),
        ({"a": entry(shape=[-1])}, "not a sound safetensors file"),
        ({"a": entry(dtype="F1")}, "not a sound safetensors file"),
        ({"a": 3}, "not a sound safetensors file"),
        ({"a": entry(), "b": entry()}, "not a sound safetensors file"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    if isinstance(header, bytes):
        header = header.replace(b"%(e)s", json.dumps(entry()).encode())
    path.write_bytes(raw(header, bytes(4)))
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_named(tmp_path, rng, keep):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors(rng))[:keep])
    with pytest.raises(InputError, match=f"{path}.*truncated"):
        read_header(path)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**31 + 100)  # a hole: no disk is used
    with pytest.raises(InputError, match=f"header of {2**31} bytes"):
        read_header(path)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt", "model.pth", "model.safetensors"])
@pytest.mark.parametrize("written_by", ["pickle", "torch", "torch, old format"])
def test_a_pickle_is_refused_and_never_runs(tmp_path, name, written_by):
    ran = tmp_path / "ran"
    directory = tmp_path / "model"
    directory.mkdir()
    path = directory / name
    if written_by == "pickle":
        path.write_bytes(pickle.dumps({"a": Canary(ran)}))
    else:
        torch.save({"a": Canary(ran)}, path, _use_new_zipfile_serialization=written_by == "torch")
    for read in (lambda: read_header(path), lambda: open_weights(directory, STEM)):
        with pytest.raises(InputError, match=f"{name}.*pickle|pickle.*{name}"):
            read()
    # Named by an index as well.
    (directory / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="pickle"):
        open_weights(directory, STEM)
    assert not ran.exists()
    with open(path, "rb") as file:
        assert written_by != "pickle" or pickle.load(file) and ran.exists()  # the canary would have sung


def test_a_pointer_of_git_lfs_is_recognised(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        read_header(path)


def test_a_users_own_links_are_followed_and_those_out_of_a_download_are_not(tmp_path):
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "real.json").write_text("{}")
    (directory / "alias.json").symlink_to("real.json")
    (directory / "config.json").symlink_to(outside)
    (directory / "broken.json").symlink_to("nowhere")
    (directory / "loop.json").symlink_to("loop.json")
    (directory / "folder").mkdir()
    assert read_json(file_of(directory, "alias.json")) == {}
    assert file_of(directory, "config.json") == directory / "config.json"
    for mark in (".git", ".gitattributes", ".cache/huggingface/download"):
        (directory / mark).mkdir(parents=True)
        (directory / "folder" / "config.json").unlink(missing_ok=True)
        (directory / "folder" / "config.json").symlink_to(outside)
        for place in (directory, directory / "folder"):
            with pytest.raises(InputError, match="config.json is a symbolic link out of the repository"):
                file_of(place, "config.json")
        assert file_of(directory, "alias.json")
        (directory / mark).rmdir()
    for name, message in [
        ("broken.json", "broken link"), ("loop.json", "broken link"), ("missing.json", "does not exist"),
        ("folder", "not a file"), ("../secret.json", "not the name"), ("..", "not the name"),
        (str(outside), "not the name"), ("a\0b", "not the name"), ("a\\b", "not the name"), ("", "not the name"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            file_of(directory, name)

    # The directory that the user names may be a link itself.
    (tmp_path / "link").symlink_to(directory)
    assert file_of(tmp_path / "link", "alias.json").exists()


def test_the_layout_of_the_cache_of_the_hub(tmp_path):
    repository = tmp_path / "models--owner--name"
    unet = repository / "snapshots" / "abc" / "unet"
    unet.mkdir(parents=True)
    (repository / "blobs").mkdir()
    blob = "0123456789abcdef" * 4
    (repository / "blobs" / blob).write_text("{}")
    (unet / "config.json").symlink_to(f"../../../blobs/{blob}")
    (unet.parent / "model_index.json").symlink_to(f"../../blobs/{blob}")
    assert file_of(unet, "config.json").exists()
    assert file_of(unet.parent, "model_index.json").exists()
    # A cache whose blobs the user keeps on another disk, or shares.
    (repository / "blobs").rename(tmp_path / "shared")
    (repository / "blobs").symlink_to(tmp_path / "shared")
    assert file_of(unet, "config.json").exists()
    (repository / "blobs").unlink()
    (tmp_path / "shared").rename(repository / "blobs")
    (repository / "blobs" / blob).rename(tmp_path / "kept")
    (repository / "blobs" / blob).symlink_to(tmp_path / "kept")
    assert file_of(unet, "config.json").exists()
    # A pipeline of the user's own that is put together of what lies there.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "unet").symlink_to(unet)
    (tmp_path / "mine" / "model_index.json").symlink_to(unet.parent / "model_index.json")
    assert file_of(tmp_path / "mine", "model_index.json") and file_of(
        tmp_path / "mine" / "unet", "config.json"
    )

    (repository / "blobs" / "not-a-hash").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / blob).write_text("{}")
    (tmp_path / "models--owner--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--owner--other" / "blobs" / blob).write_text("{}")
    for i, target in enumerate(
        ["../blobs/not-a-hash", f"../refs/{blob}", f"../../models--owner--other/blobs/{blob}"]
    ):
        (unet / f"{i}.json").symlink_to(f"../../{target}")
        assert (unet / f"{i}.json").exists()
        with pytest.raises(InputError, match="symbolic link out"):
            file_of(unet, f"{i}.json")


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_errors_or_readable_and_memory_stays_bounded(tmp_path, count):
    rng = np.random.default_rng(1)
    whole = save(tensors(rng), metadata={"format": "pt"})
    path = tmp_path / "x.safetensors"
    refused = 0
    tracemalloc.start()
    for _ in range(count):
        path.write_bytes(mutated(whole, rng))
        try:
            header = read_header(path)
            known = {name: info for name, info in header.items() if info.dtype in DTYPES}
            for mapped in (True, False):
                for _, array in read_tensors(path, known, mapped=mapped):
                    assert array.nbytes <= len(whole) and array.tobytes() is not None
        except InputError as error:
            refused += 1
            str(error).encode()  # prints anywhere
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > count // 3
    assert peak < 20 * 2**20


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """Returns the file with bytes overwritten, cut, doubled or inserted, mostly in its header."""
    data = bytearray(whole)
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, min(len(data), end + 20)))
        size = int(rng.integers(1, 12))
        kind = rng.integers(0, 6)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size]
        elif kind == 3:
            data[at : at + size] = rng.bytes(size)
        elif kind == 4:
            digits = [i for i in range(8, min(end, len(data))) if chr(data[i]).isdigit()]
            if digits:
                data[digits[int(rng.integers(len(digits)))]] = ord(str(rng.integers(0, 10)))
        else:
            del data[len(data) - min(size, len(data) - 1) :]
    if rng.random() < 0.5 and len(data) > 8:
        # A length that fits again, so that the mutation reaches the parser.
        brace = data.rfind(b"}}")
        length = brace + 2 - 8 if brace > 8 else len(data) - 8
        data[:8] = struct.pack("<Q", max(length, 0))
    return bytes(data)


def test_a_new_directory_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match="stop"), new_directory(target) as partial:
        (partial / "file").write_text("x")
        raise InputError("stop")
    assert not target.exists() and list(target.parent.iterdir()) == []
    with pytest.raises(InputError, match=f"cannot write {target}: No space left"), new_directory(target):
        raise OSError(28, "No space left on device")
    target.mkdir()
    with new_directory(target) as partial:
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text("x")
    assert (target / "folder" / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with (
        pytest.raises(InputError, match=f"{target} is not empty; nothing was written"),
        new_directory(target),
    ):
        raise AssertionError
    with pytest.raises(InputError, match="is a file"), new_directory(target / "folder" / "file"):
        raise AssertionError
    with pytest.raises(InputError, match="cannot write"), new_directory(target / "folder" / "file" / "x"):
        raise AssertionError


def test_json_that_is_too_large_or_names_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(2**31)
    with pytest.raises(InputError, match=f"{path} is larger than"):
        read_json(path)
    with pytest.raises(InputError, match="source gives the same key twice: 'b'"):
        parse_json(b'{"a": [{"b": 1, "b": 2}]}', "source")
