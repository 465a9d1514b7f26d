"""Files of torch.save, in both formats, against torch's own reader; what could run is never run."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from sbv2_jax.convert.formats.torch_files import read_torch_file
from sbv2_jax.errors import InputError

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(6, 8)
    return {
        "dense": torch.randn(4, 3),
        "transposed": torch.randn(5, 7).T,
        "part": shared[2:5, 1::3],
        "whole": shared,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(9).half(),
        "bfloat16": torch.randn(2, 2, 2, 2).bfloat16(),
        "double": torch.randn(3).double(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }


def save(path, value, zipped):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@ZIPPED
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_tensor_is_the_one_that_torch_reads(tmp_path, zipped, wrapped):
    value = tensors()
    path = save(
        tmp_path / "x.pth", {"state_dict": value, "epoch": 3, "lr": 0.1} if wrapped else value, zipped
    )
    found = read_torch_file(path)
    assert found.keys() == value.keys()
    for name, tensor in value.items():
        assert found[name].shape == tuple(tensor.shape) and str(tensor.dtype) == f"torch.{found[name].dtype}"
        theirs = tensor.detach()
        np.testing.assert_array_equal(found[name].astype(np.float64), theirs.double().numpy())


@ZIPPED
def test_a_module_s_state_dict_with_its_metadata(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    found = read_torch_file(save(tmp_path / "x.pth", module.state_dict(), zipped))
    assert found.keys() == module.state_dict().keys() and found["1.num_batches_tracked"] == 0
    np.testing.assert_array_equal(found["0.weight"], module[0].weight.detach())


class Calls:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@ZIPPED
def test_what_the_pickle_calls_is_named_and_not_called(tmp_path, zipped):
    trap = tmp_path / "called"
    path = save(tmp_path / "x.pth", {"w": torch.zeros(2), "trap": Calls(trap)}, zipped)
    with pytest.raises(
        InputError, match=r"x.pth is a pickle that holds more than tensors: .*'(_io|io) open'"
    ):
        read_torch_file(path)
    assert not trap.exists()


@ZIPPED
def test_a_whole_module_is_refused(tmp_path, zipped):
    with pytest.raises(InputError, match="more than tensors: the name 'torch.nn.modules.linear Linear'"):
        read_torch_file(save(tmp_path / "x.pth", torch.nn.Linear(2, 2), zipped))


@ZIPPED
def test_truncated_and_foreign_files_are_refused(tmp_path, zipped):
    # Storages stand in the order of their addresses: with one that is empty alone, it is the last.
    for value in (tensors(), {"none": torch.zeros(0, 4)}):
        path = save(tmp_path / "x.pth", value, zipped)
        data = path.read_bytes()
        for end in (0, 3, 20, len(data) // 3, *range(len(data) - 12, len(data))):
            path.write_bytes(data[:end])
            with pytest.raises(InputError, match=r"x\.pth"):
                read_torch_file(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="no file of torch.save"):
        read_torch_file(path)
    with pytest.raises(InputError, match=r"nowhere\.pth"):
        read_torch_file(tmp_path / "nowhere.pth")


def test_no_tensors_is_said(tmp_path):
    for value in ({"a": 1}, [torch.zeros(2)], {}):
        with pytest.raises(InputError, match="holds no"):
            read_torch_file(save(tmp_path / "x.pth", value, True))


def rewritten(path, change):
    """The archive with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    path.write_bytes(buffer.getvalue())
    return path


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = save(tmp_path / "x.pth", {"w": torch.zeros(250, 3)}, True)
    long = rewritten(path, lambda data: data.replace(b"K\xfaK\x03\x86", b"K\xffK\x03\x86", 1))
    with pytest.raises(InputError, match="'w' reaches out of its storage"):
        read_torch_file(long)
    path = save(tmp_path / "y.pth", {"w": torch.zeros(250, 3)}, True)
    stepless = rewritten(
        path,
        lambda data: data.replace(b"K\x03K\x01\x86", b"K\x00K\x00\x86").replace(
            b"K\xfaK\x03", b"M\xfa\xfaK\x03"
        ),
    )
    with pytest.raises(InputError, match="'w' reaches out of its storage"):
        read_torch_file(stepless)


@ZIPPED
def test_a_file_with_flipped_bytes_gives_tensors_or_one_error(tmp_path, zipped):
    data = save(tmp_path / "x.pth", {"state_dict": tensors(), "epoch": 3}, zipped).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1500):
        changed = bytearray(data)
        # most of the opcodes are in the first kilobyte
        places = rng.integers(0, rng.choice([1500, len(data)]), rng.integers(1, 4))
        for place, value in zip(places, rng.integers(0, 256, len(places)), strict=True):
            changed[place] = value
        (tmp_path / "y.pth").write_bytes(changed)
        try:
            read_torch_file(tmp_path / "y.pth")
        except InputError as error:
            refused += 1
            assert "y.pth" in str(error)
    assert refused > 100
