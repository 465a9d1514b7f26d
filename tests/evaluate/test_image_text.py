"""Cosines of pictures and captions against OpenCLIP's own model, and its layouts of files."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import measured, relative_error
from huggingface_hub.utils import filter_repo_objects
from parity import randomised
from PIL import Image
from safetensors.torch import save_file
from their_judges import openclip
from tiny_tokenizer import write_tokenizer

from sbv2_jax.convert.formats.openclip_names import sources_of
from sbv2_jax.convert.openclip import convert, read_config
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import resize
from sbv2_jax.evaluate.extractors import EXTRACTORS
from sbv2_jax.evaluate.extractors.image_text import open_image_text
from sbv2_jax.models.registry import network

VISION = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 4.3637}
TEXT = {"context_length": 77, "vocab_size": 522, "width": 16, "heads": 4, "layers": 2}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
CAPTIONS = ["a red apple", "dog", "A DOG and an apple", ""]


def their_model():
    """OpenCLIP's own module."""
    torch.manual_seed(0)
    return randomised(openclip("model").CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT))


def write(directory, model):
    directory.mkdir(parents=True)
    values = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(values))
    write_tokenizer(directory, 2)
    tensors = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "attn_mask"
    }
    save_file(tensors, directory / "open_clip_model.safetensors")
    return directory


def their_cosines(model, tokenizer, small, captions):
    pixels = (torch.from_numpy(small / 255.0) - torch.tensor(MEAN)) / torch.tensor(STD)
    ids = torch.from_numpy(tokenizer.encode(captions)).long()
    with torch.inference_mode():
        seen = model.encode_image(pixels.permute(0, 3, 1, 2).float(), normalize=True)
        said = model.encode_text(ids, normalize=True)
    return seen.numpy(), (seen * said).sum(-1).numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = their_model()
    return model, write(tmp_path_factory.mktemp("clip") / "original", model)


def test_cosines_of_openclip_s_own_model_in_either_layout(world, tmp_path, rng):
    model, directory = world
    convert(directory, tmp_path / "converted")
    pictures = rng.integers(0, 256, (4, 40, 52, 3)).astype(np.uint8)
    # of 28 x 36, the middle: torchvision rounds 36.4 down
    small = [np.asarray(Image.fromarray(one).resize((36, 28), Image.BICUBIC))[:, 4:32] for one in pictures]
    prefix = "a photo depicts "
    given = [prefix + caption for caption in CAPTIONS]
    ours = open_image_text(directory, per_device=3)
    _, expected = their_cosines(model, ours.tokenizer, np.stack(small), given)
    found = ours.similarity(pictures, CAPTIONS, prefix=prefix)
    assert found.shape == (4,) and found.dtype == np.float64
    assert measured(np.abs(found - expected).max()) < 1e-6
    assert np.ptp(expected) > 1e-3, "captions and pictures matter"
    other = open_image_text(tmp_path / "converted", per_device=3)
    np.testing.assert_array_equal(other.similarity(pictures, CAPTIONS, prefix=prefix), found)
    assert other.fingerprint == ours.fingerprint
    parts = list(ours.stream([(pictures[:1], CAPTIONS[:1]), (pictures[1:], CAPTIONS[1:])], prefix=prefix))
    np.testing.assert_array_equal(np.concatenate(parts), found)
    assert not np.allclose(ours.similarity(pictures, CAPTIONS), found, atol=1e-3)
    assert ours.similarity(pictures[:0], []).shape == (0,)
    with pytest.raises(ValueError):
        ours.similarity(pictures, CAPTIONS[:3])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_of_their_own_as_hpsv2_is_published(world, tmp_path, rng, zipped):
    _, directory = world
    torch.manual_seed(7)
    judge = randomised(openclip("model").CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT))
    checkpoint = {"epoch": 3, "name": "x", "state_dict": judge.state_dict()}
    torch.save(checkpoint, tmp_path / "HPS_v2_compressed.pt", _use_new_zipfile_serialization=zipped)
    ours = open_image_text(
        directory, weights=tmp_path / "HPS_v2_compressed.pt", resized=resize.bicubic_then_pad, per_device=4
    )
    pictures = rng.integers(0, 256, (4, 28, 28, 3)).astype(np.uint8)
    _, expected = their_cosines(judge, ours.tokenizer, pictures, CAPTIONS)
    assert measured(np.abs(ours.similarity(pictures, CAPTIONS) - expected).max()) < 1e-6
    convert(directory, tmp_path / "out", weights=tmp_path / "HPS_v2_compressed.pt")
    again = open_image_text(tmp_path / "out", resized=resize.bicubic_then_pad)
    assert again.fingerprint == ours.fingerprint != open_image_text(directory).fingerprint


def test_weights_of_another_network_are_listed(world, tmp_path):
    model, directory = world
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "visual.proj"}
    torch.save(state | {"more": torch.zeros(2), "ln_final.bias": torch.zeros(16).double()}, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"x.pt does not fit its open_clip_config.json in 3 tensors"
    ) as error:
        open_image_text(directory, weights=tmp_path / "x.pt")
    for line in ("missing visual.proj (32, 12)", "unexpected more (2,)", "ln_final.bias has type float64"):
        assert line in str(error.value)


def test_image_features_are_of_length_one_and_of_the_centre_square(world, rng):
    model, directory = world
    pictures = rng.integers(0, 256, (3, 40, 61, 3)).astype(np.uint8)
    small = [Image.fromarray(one[:, 10:50]).resize((28, 28), Image.BICUBIC) for one in pictures]
    extractor = EXTRACTORS["clip"](directory, per_device=3)
    tokenizer = open_image_text(directory).tokenizer
    expected, _ = their_cosines(model, tokenizer, np.stack([np.asarray(one) for one in small]), CAPTIONS[:3])
    ours = extractor(pictures)["features"]
    assert relative_error(ours, expected) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1.0, rtol=1e-6)
    assert extractor.name == "clip" and list(extractor(pictures)) == ["features"]


def test_of_a_hub_repository_in_both_layouts_one_is_fetched(world, tmp_path, monkeypatch):
    _, directory = world
    convert(directory, tmp_path / "hub")
    for file in directory.iterdir():
        shutil.copyfile(file, tmp_path / "hub" / file.name)
    fetched = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns, **_):
        snapshot = Path(tempfile.mkdtemp(dir=tmp_path))
        files = filter_repo_objects(
            [path.name for path in (tmp_path / "hub").iterdir()],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        for file in files:
            shutil.copyfile(tmp_path / "hub" / file, snapshot / file)
        fetched.append({path.name for path in snapshot.glob("*.safetensors")})
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    expected = open_image_text(directory).fingerprint
    assert open_image_text("owner/clip").fingerprint == expected
    assert set().union(*fetched) == {"open_clip_model.safetensors"}
    (tmp_path / "hub" / "open_clip_model.safetensors").unlink()
    fetched.clear()
    assert open_image_text("owner/clip").fingerprint == expected
    assert set().union(*fetched) == {"model.safetensors"}


# OpenCLIP's own model_configs/*.json
PUBLISHED = {
    "ViT-L-14-336": (
        768,
        {"image_size": 336, "layers": 24, "width": 1024},
        {"width": 768, "heads": 12, "layers": 12},
    ),
    "ViT-H-14": (
        1024,
        {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80},
        {"width": 1024, "heads": 16, "layers": 24},
    ),
    "ViT-g-14": (
        1024,
        {"image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637},
        {"width": 1024, "heads": 16, "layers": 24},
    ),
    "ViT-bigG-14": (
        1280,
        {"image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231},
        {"width": 1280, "heads": 20, "layers": 32},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_sizes_is_asked_for_in_its_shape(tmp_path, name):
    dim, vision, text = PUBLISHED[name]
    vision, text = vision | {"patch_size": 14}, text | {"context_length": 77, "vocab_size": 49408}
    with torch.device("meta"):
        theirs = openclip("model").CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text)
    values = {"model_cfg": {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    config, _ = read_config(tmp_path / "open_clip_config.json")
    sources = sources_of(network(config).shapes).values()
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
    assert {one.name: one.shape for one in sources} == expected
    assert config.vision_config.num_attention_heads == vision["width"] // vision.get("head_width", 64)
