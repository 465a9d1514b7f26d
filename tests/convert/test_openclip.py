"""OpenCLIP's files against the model of transformers that holds the same weights."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from huggingface_hub.utils import filter_repo_objects
from made_openclip import MEAN, STD, TEXT, VISION, config_file, original_tensors, their_model, write
from safetensors.numpy import load_file
from tiny_tokenizer import write_tokenizer

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.openclip import convert, read_config
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network


@pytest.mark.parametrize("quick", [True, False])
def test_every_tensor_is_that_of_transformers_and_so_are_the_features(tmp_path, rng, quick):
    theirs = their_model("quick_gelu" if quick else "gelu")
    convert(write(tmp_path / "original", original_tensors(theirs), quick_gelu=quick), tmp_path / "out")

    reloaded, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: list(found) for key, found in info.items() if found} == {}
    want, got = theirs.state_dict(), reloaded.state_dict()
    assert got.keys() == want.keys() and len(want) > 80
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert reloaded.config.text_config.hidden_act == theirs.config.text_config.hidden_act

    part = load_component(tmp_path / "out")
    model = network(part.config)
    pictures = rng.standard_normal((2, 24, 24, 3), np.float32)
    ids = np.array([[48, 7, 3, 49, 0, 0, 0, 0, 0], [48, 5, 49, 49, 49, 49, 49, 49, 49]], np.int32)
    with torch.no_grad():
        output = theirs(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch.from_numpy(pictures).permute(0, 3, 1, 2),
        )
    logits = jax.jit(model.apply)(part.params, ids, pictures)
    assert relative_error(logits, output.logits_per_image.numpy()) < 1e-5


def test_halves_the_tokenizer_and_what_early_files_hold_besides(tmp_path):
    tensors = original_tensors(their_model("gelu"))
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    directory = write(tmp_path / "original", halves | {"attn_mask": np.zeros((9, 9), np.float32)})
    tokenizer = Path(write_tokenizer(tmp_path / "tokens", 2))
    for path in tokenizer.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "preprocessor_config.json").write_text('{"of": "another"}')
    convert(directory, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    got = load_file(file)
    assert {array.dtype for array in got.values()} == {np.dtype(ml_dtypes.bfloat16)}
    name = "transformer.resblocks.1.attn.in_proj_bias"
    parts = [got[f"text_model.encoder.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), halves[name])
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    image = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(image.crop_size) == {"height": 24, "width": 24}
    assert (list(image.image_mean), list(image.image_std)) == (MEAN, STD)


def test_it_is_fetched_from_the_hub_and_only_its_own_files_are(tmp_path, monkeypatch):
    repository = write(tmp_path / "hub", original_tensors(their_model("gelu")))
    for name in ("model.safetensors", "open_clip_pytorch_model.bin", "README.md"):
        (repository / name).write_text("large")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision) == ("owner/clip", "v2")
        files = [path.name for path in repository.iterdir()]
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            shutil.copyfile(repository / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    convert("owner/clip@v2", tmp_path / "out")
    assert {path.name for path in snapshot.iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    convert(repository, tmp_path / "local")
    ours, theirs = (load_component(tmp_path / name).params for name in ("out", "local"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_every_tensor_that_does_not_fit_is_listed_by_its_own_name(tmp_path):
    tensors = original_tensors(their_model("gelu"))
    del tensors["visual.ln_pre.bias"]
    tensors["text_projection"] = tensors["text_projection"].T.copy()
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    tensors["transformer.resblocks.0.attn.in_proj_bias"] = np.zeros(48, np.float64)
    tensors["visual.ls_1.gamma"] = np.zeros(3, np.float32)
    directory = write(tmp_path / "original", tensors)
    with pytest.raises(InputError, match="open_clip_config.json in 5 tensors") as error:
        convert(directory, tmp_path / "out")
    for line in (
        "missing visual.ln_pre.bias (24,)",
        "text_projection has shape (12, 16), expected (16, 12)",
        "logit_scale has shape (1,), expected ()",
        "transformer.resblocks.0.attn.in_proj_bias has type F64",
        "unexpected visual.ls_1.gamma (3,)",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "out").exists()


REFUSED = {
    "another tower": (
        {"vision_cfg": VISION | {"timm_model_name": "vit"}},
        "vision_cfg: timm_model_name='vit'",
    ),
    "another pooling": ({"text_cfg": TEXT | {"pool_type": "last"}}, "text_cfg: pool_type='last'"),
    "unknown": ({"multimodal_cfg": {}}, r"model_cfg: unknown field multimodal_cfg=\{\}"),
    "layer scale": ({"vision_cfg": VISION | {"ls_init_value": 0.1}}, "ls_init_value=0.1 is not supported"),
    "resnet": ({"vision_cfg": VISION | {"layers": [3, 4, 6, 3]}}, r"num_hidden_layers=\(3, 4, 6, 3\)"),
    "no towers": ({"text_cfg": None}, "has no model_cfg with a vision_cfg and a text_cfg"),
    "heads": ({"vision_cfg": VISION | {"head_width": 0}}, "division"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_is_no_clip_of_transformers_is_refused(tmp_path, case):
    changes, message = REFUSED[case]
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config_file(**changes)))
    with pytest.raises(InputError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_pictures_resampled_otherwise_and_missing_files_are_refused(tmp_path):
    directory = write(tmp_path / "original", {"x": np.zeros(1, np.float32)})
    values = config_file()
    values["preprocess_cfg"]["interpolation"] = "bilinear"
    (directory / "open_clip_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="preprocess_cfg: interpolation='bilinear' is not supported"):
        convert(directory, tmp_path / "out")
    (directory / "open_clip_config.json").write_text(json.dumps(config_file()))
    (directory / "open_clip_model.safetensors").rename(directory / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="pickles only"):
        convert(directory, tmp_path / "out")
    with pytest.raises(InputError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
