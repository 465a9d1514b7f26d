"""from-inception: the directory holds the very tensors of the published layout, of either format of torch.save."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.published_shapes import torch_shapes
from sbv2_jax.convert.inception import convert
from sbv2_jax.errors import InputError
from sbv2_jax.models.inception import InceptionConfig
from sbv2_jax.models.registry import network


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    shapes = torch_shapes(network(InceptionConfig()).shapes)
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    return found | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_tensor_is_that_of_the_file(tmp_path, weights, zipped):
    file = tmp_path / "pt_inception.pth"
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    convert(file, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == weights.keys() - {"Conv2d_1a_3x3.bn.num_batches_tracked"}
    assert len(got) == 94 * 5 + 2 and got["fc.weight"].shape == (1008, 2048)
    for name, array in got.items():
        np.testing.assert_array_equal(array, weights[name].numpy())
    config = load_component(tmp_path / "out").config
    assert config.converted_from == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not config.is_published
    assert InceptionConfig(converted_from="6726825d" + 56 * "0").is_published


def test_other_tensors_are_listed_and_nothing_is_written(tmp_path, weights):
    fewer = {name: tensor for name, tensor in weights.items() if name != "Mixed_7c.branch_pool.conv.weight"}
    other = {"AuxLogits.fc.bias": torch.zeros(1000), "fc.weight": torch.zeros(1008, 2047)}
    torch.save(fewer | other, tmp_path / "x.pth")
    with pytest.raises(InputError, match="x.pth does not match the network of its config.json in 3") as error:
        convert(tmp_path / "x.pth", tmp_path / "out")
    for line in (
        "missing Mixed_7c.branch_pool.conv.weight (192, 2048, 1, 1)",
        "unexpected AuxLogits.fc.bias (1000,)",
        "fc.weight has shape (1008, 2047), expected (1008, 2048)",
    ):
        assert line in str(error.value)
    torch.save(weights | {"fc.bias": weights["fc.bias"].half()}, tmp_path / "half.pth")
    with pytest.raises(InputError, match="half.pth: fc.bias is float16, float32 is expected"):
        convert(tmp_path / "half.pth", tmp_path / "out")
    torch.save(weights | {"fc.bias": weights["fc.bias"] * float("nan")}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="fc.bias"):
        convert(tmp_path / "nan.pth", tmp_path / "out")
    with pytest.raises(InputError, match="nowhere.pth does not exist"):
        convert(tmp_path / "nowhere.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, weights):
    torch.save(weights, tmp_path / "x.pth")
    command = [sys.executable, "launch/convert.py", "from-inception", f"--model={tmp_path}/x.pth"]
    subprocess.run([*command, f"--out={tmp_path}/out"], check=True, timeout=120)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["_class_name"], written["num_classes"]) == ("InceptionV3", 1008)
