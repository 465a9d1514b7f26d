"""The choice of a model's weight files, shards and their index."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from some_tensors import STEM, infos, tensors

from sbv2_jax.convert.formats.weight_files import open_weights, write_weights
from sbv2_jax.errors import InputError


def shards(directory: Path, rng) -> Path:
    arrays = tensors(rng)
    write_weights(directory, STEM, infos(arrays), arrays.__getitem__, max_shard_bytes=80)
    return directory / f"{STEM}.safetensors.index.json"


def test_shards_are_written_and_read(tmp_path, rng):
    index = shards(tmp_path, np.random.default_rng(0))
    arrays = tensors(np.random.default_rng(0))
    total = sum(array.nbytes for array in arrays.values())
    assert json.loads(index.read_text())["metadata"] == {"total_size": total}
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    assert all(sum(a.nbytes for a in load_file(tmp_path / file).values()) <= 80 for file in files)
    found = dict(open_weights(tmp_path, STEM).read(arrays, mapped=True))
    assert found.keys() == arrays.keys()
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": "../elsewhere.safetensors"}, "not the name of a file"),
        ({"a.weight": "/etc/x.safetensors"}, "not the name of a file"),
        ({"a.weight": "x\0.safetensors"}, "not the name of a file"),
        ({"a.weight": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"a.weight": "config.json"}, "'config.json' is not the name of a safetensors file"),
        ({"a.weight": 3}, "no weight_map"),
        ({"a.weight": "model-00002-of-00002.safetensors"}, "'a.weight' is not in model-00002"),
        ({"more": "model-00001-of-00002.safetensors"}, "'more' is not in model-00001"),
        ({"a.weight": None}, "'a.weight' is in model-00001-of-00002.safetensors, not in the index"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, rng, change, message):
    index = shards(tmp_path, rng)
    values = json.loads(index.read_text())
    values["weight_map"] |= change
    if None in change.values():
        del values["weight_map"]["a.weight"]
    index.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path, STEM)


def test_a_missing_shard_and_a_key_in_two_shards(tmp_path, rng):
    index = shards(tmp_path, rng)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"a.weight": np.zeros(1, np.float32)}, second)
    with pytest.raises(InputError, match="'a.weight' is in model-00001.* and in model-00002") as caught:
        open_weights(tmp_path, STEM)
    assert str(index) in str(caught.value)
    second.unlink()
    with pytest.raises(InputError, match=f"{second} does not exist"):
        open_weights(tmp_path, STEM)


def test_a_key_twice_in_the_index_and_an_index_without_a_map(tmp_path):
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(InputError, match=f"{index} gives the same key twice: 'a'"):
        open_weights(tmp_path, STEM)
    index.write_text('{"weight_map": []}')
    with pytest.raises(InputError, match="no weight_map"):
        open_weights(tmp_path, STEM)


def test_the_plain_file_is_chosen_and_a_variant_if_it_is_the_only_one(tmp_path):
    def write(name: str, value: float) -> None:
        save_file({"a": np.full(1, value, np.float32)}, tmp_path / name)

    def chosen() -> float:
        return next(open_weights(tmp_path, STEM).read("a", mapped=True))[1].item()

    with pytest.raises(InputError, match=f"{tmp_path} has no {STEM}.safetensors"):
        chosen()
    write("model.fp16.safetensors", 1)
    write("modelling.safetensors", 9)
    (tmp_path / "model.bin").write_bytes(b"a pickle beside safetensors is left alone")
    assert chosen() == 1
    write("model.non_ema.safetensors", 2)
    with pytest.raises(InputError, match="model.fp16.safetensors, model.non_ema.safetensors: move all but"):
        chosen()
    write("model.safetensors", 3)
    assert chosen() == 3
    for name in ("model.fp16", "model.non_ema", "model"):
        (tmp_path / f"{name}.safetensors").unlink()
    write("model.ema-00001-of-00001.safetensors", 4)
    index = {"weight_map": {"a": "model.ema-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.ema.json").write_text(json.dumps(index))
    assert chosen() == 4
