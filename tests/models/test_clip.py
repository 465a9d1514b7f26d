"""CLIP against transformers: forward, pooling, names of the real checkpoints, configurations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from safetensors.numpy import load_file, save_file

from sbv2_jax.convert.formats.names import params_from_torch, params_to_torch, torch_name
from sbv2_jax.errors import InputError
from sbv2_jax.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    tensors_of_file,
)
from sbv2_jax.models.clip_image import preprocess
from sbv2_jax.models.network import Network
from sbv2_jax.tree import cast, count

# The widths of the real text towers, with fewer layers and a small vocabulary.
SD1 = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 2}
SD2 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
}
ODD = {
    "hidden_size": 42,
    "intermediate_size": 50,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "projection_dim": 10,
    "max_position_embeddings": 13,
    "layer_norm_eps": 1e-3,
}
SMALL = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}


def text_config(shape, **changes):
    return {**SMALL, **shape, **changes}


def clip_config(**vision):
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    return {
        "text_config": text_config(ODD),
        "vision_config": {**shape, "image_size": 64, "patch_size": 32, **vision},
        "projection_dim": 20,
    }


def randomise(module, seed=0):
    """Draws every parameter, so that no bias, scale or embedding stays at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2 and "embedding" not in name:
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(noise * 0.3 + ("norm" in name and name.endswith("weight")))
    return module.eval()


def pair(ours, theirs, config_class, their_config_class, values):
    """Returns our network, its parameters and transformers' module with the same random weights."""
    module = randomise(theirs(their_config_class(**values)))
    network = Network(lambda rngs: ours(config_class.from_dict(values), rngs))
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    return network, params_from_torch(tensors_of_file(tensors), network.shapes), module


def text_pair(values, projected=False):
    ours, theirs = (
        (CLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection)
        if projected
        else (CLIPTextModel, transformers.CLIPTextModel)
    )
    return pair(ours, theirs, CLIPTextConfig, transformers.CLIPTextConfig, values)


@pytest.fixture(scope="module")
def odd():
    return text_pair(text_config(ODD))


@pytest.fixture(scope="module")
def clip():
    return pair(CLIPModel, transformers.CLIPModel, CLIPConfig, transformers.CLIPConfig, clip_config())


def token_ids(rng, batch, length, end=63):
    """Random prompts that end at different places and are padded with the end token."""
    ids = rng.integers(3, 62, (batch, length))
    for row, stop in enumerate(rng.integers(1, length, batch)):
        ids[row, stop:] = end
    return ids.astype(np.int32)


@pytest.mark.parametrize(
    ("shape", "length", "projected"),
    [(SD1, 77, False), (SD2, 77, False), (ODD, 9, False), (ODD, 13, True)],
    ids=["sd1", "sd2", "odd", "projected"],
)
def test_text_model_equals_transformers_layer_by_layer(rng, shape, length, projected):
    network, params, module = text_pair(text_config(shape), projected)
    ids = token_ids(rng, 2, length)
    ours = jax.jit(lambda p, x: network.apply(p, x, output_hidden_states=True))(params, ids)
    with torch.no_grad():
        theirs = module(torch.tensor(ids).long(), output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == shape["num_hidden_layers"] + 1
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert relative_error(mine, other) < 1e-4
    assert relative_error(ours.last_hidden_state, theirs.last_hidden_state) < 1e-4
    assert relative_error(ours.pooled, theirs.text_embeds if projected else theirs.pooler_output) < 1e-4


def test_pooling_takes_the_largest_id_under_the_legacy_end_token_else_the_first_end(odd, monkeypatch):
    # 2 occurs although it is not the end, 50 ends before 63, the largest, and occurs again.
    ids = np.array([[62, 2, 50, 7, 63, 63], [62, 63, 5, 50, 50, 2]], np.int32)
    positions = {2: [4, 1], 50: [2, 3], 63: [4, 1]}
    _, params, module = odd
    for eos, expected in positions.items():
        config = CLIPTextConfig.from_dict(text_config(ODD, eos_token_id=eos))
        network = Network(lambda rngs, config=config: CLIPTextModel(config, rngs))
        ours = jax.jit(network.apply)(params, ids)
        monkeypatch.setattr(module, "eos_token_id", eos)
        with torch.no_grad():
            theirs = module(torch.tensor(ids).long()).pooler_output
        assert relative_error(ours.pooled, theirs) < 1e-4
        assert relative_error(ours.pooled, ours.last_hidden_state[np.arange(2), expected]) < 1e-6


def test_a_later_token_does_not_change_earlier_states(rng, odd):
    network, params, _ = odd
    ids = rng.integers(3, 60, (1, 13)).astype(np.int32)
    changed = ids.copy()
    changed[0, 8] += 1
    run = jax.jit(network.apply)
    before, after = run(params, ids).last_hidden_state, run(params, changed).last_hidden_state
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert (np.abs(before[:, 8:] - after[:, 8:]).max(axis=(0, 2)) > 1e-3).all()


def test_clip_model_equals_transformers(rng, clip):
    network, params, module = clip
    ids = token_ids(rng, 3, 13)
    pixels = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    their_ids, their_pixels = torch.tensor(ids).long(), torch.tensor(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        text = module.get_text_features(their_ids).pooler_output
        image = module.get_image_features(their_pixels).pooler_output
        logits = module(their_ids, their_pixels).logits_per_image

    def ours(params):
        return [
            network.apply(params, ids, method="text_features"),
            network.apply(params, pixels, method="image_features"),
            network.apply(params, ids, pixels),
        ]

    for mine, other in zip(jax.jit(ours)(params), (text, image, logits), strict=True):
        assert relative_error(mine, other) < 1e-4


@pytest.mark.parametrize(("image", "patch"), [(42, 14), (32, 10)])
def test_vision_tower_equals_transformers_at_other_patch_sizes(rng, image, patch):
    # 10 does not divide 32: the last pixels belong to no patch.
    values = clip_config(image_size=image, patch_size=patch, hidden_act="gelu")
    network, params, module = pair(
        CLIPModel, transformers.CLIPModel, CLIPConfig, transformers.CLIPConfig, values
    )
    pixels = rng.normal(size=(1, image, image, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = module.get_image_features(torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output
    ours = jax.jit(lambda p, x: network.apply(p, x, method="image_features"))(params, pixels)
    assert relative_error(ours, theirs) < 1e-4


def test_gradient_of_image_features_flows_to_the_picture_as_in_torch(rng, clip):
    network, params, module = clip
    images = rng.uniform(-1.2, 1.2, (2, 96, 96, 3)).astype(np.float32)
    direction = rng.normal(size=(2, 20)).astype(np.float32)

    def ours(x):
        features = network.apply(params, preprocess(x, 64), method="image_features")
        return jnp.sum(features * direction)

    x = torch.tensor(images, requires_grad=True)
    resized = torch.nn.functional.interpolate(
        (x * 0.5 + 0.5).clamp(0, 1).permute(0, 3, 1, 2), size=(64, 64), mode="bicubic", antialias=True
    )
    mean = torch.tensor(transformers.image_utils.OPENAI_CLIP_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(transformers.image_utils.OPENAI_CLIP_STD).view(1, 3, 1, 1)
    features = module.get_image_features((resized - mean) / std).pooler_output
    (features * torch.tensor(direction)).sum().backward()
    assert relative_error(jax.jit(jax.grad(ours))(images), x.grad) < 1e-4


def test_bfloat16_parameters_give_bfloat16_outputs_near_the_float32_ones(rng, clip, odd):
    network, params, _ = clip
    ids, pixels = token_ids(rng, 2, 13), jnp.asarray(rng.normal(size=(2, 64, 64, 3)), jnp.bfloat16)

    @jax.jit
    def run(params):
        text = network.apply(params, ids, method="text_features")
        return text, network.apply(params, pixels, method="image_features")

    for low, full in zip(run(cast(params, jnp.bfloat16)), run(params), strict=True):
        assert low.dtype == jnp.bfloat16 and full.dtype == jnp.float32
        assert relative_error(low, full) < 0.05
    network, params, _ = odd
    shapes = jax.eval_shape(
        lambda p: network.apply(p, ids, output_hidden_states=True), cast(params, "bfloat16")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


VIT_L = {**SD1, "num_hidden_layers": 12, "projection_dim": 768}
VIT_H = {**SD2, "num_hidden_layers": 23}


@pytest.mark.parametrize(
    ("ours", "theirs", "values", "parameters"),
    [
        (CLIPTextModel, transformers.CLIPTextModel, VIT_L, 123_060_480),
        (CLIPTextModel, transformers.CLIPTextModel, VIT_H, 340_387_840),
        (CLIPModel, transformers.CLIPModel, {}, 151_277_313),
    ],
    ids=["sd15", "sd21", "vit-b-32"],
)
def test_parameters_of_real_checkpoints_by_name_shape_and_number(ours, theirs, values, parameters):
    whole = ours is CLIPModel
    config = (CLIPConfig if whole else CLIPTextConfig).from_dict(values)
    network = Network(lambda rngs: ours(config, rngs))
    with torch.device("meta"):
        module = theirs((transformers.CLIPConfig if whole else transformers.CLIPTextConfig)(**values))
    state = tensors_of_file(module.state_dict())
    assert {torch_name(name) for name in network.shapes} == set(state)
    assert len(network.shapes) == len(state)
    for name, shape in network.shapes.items():
        assert sorted(shape.shape) == sorted(state[torch_name(name)].shape), name
    assert count(network.shapes) == sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize("projected", [False, True])
def test_written_text_encoder_loads_in_transformers_and_reads_back(rng, tmp_path, projected):
    values = text_config(ODD, architectures=["CLIPTextModelWithProjection" if projected else "CLIPTextModel"])
    network, params, module = text_pair(values, projected)
    config = CLIPTextConfig.from_dict(values)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(params_to_torch(params), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = type(module).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])

    # transformers' own files, and the buffers of its older ones.
    module.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(13)[None]
    again = params_from_torch(tensors_of_file(tensors), network.shapes)
    for name in params:
        np.testing.assert_array_equal(again[name], params[name])
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert CLIPTextConfig.from_dict(theirs) == config


# text_encoder/config.json of Stable Diffusion 1.5, and a tower of 2022 with every generation field.
SD15_FILE = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
GENERATION = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "exponential_decay_length_penalty": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "num_beams": 1,
    "pruned_heads": {},
    "return_dict": True,
    "tie_word_embeddings": True,
    "top_k": 50,
    "torchscript": False,
    "use_bfloat16": False,
}


def test_configurations_of_old_files_are_read_as_transformers_reads_them():
    assert CLIPTextConfig.from_dict(SD15_FILE).eos_token_id == 2
    tower = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}
    text = {**SD15_FILE, **GENERATION, "architectures": None}
    vision = {**GENERATION, "model_type": "clip_vision_model", "bos_token_id": None, **tower}
    for deprecated in (None, {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}):
        values = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 768,
            "text_config": dict(text),
            "text_config_dict": deprecated,
            "vision_config": dict(vision),
            "vision_config_dict": None,
        }
        ours = CLIPConfig.from_dict(values)
        theirs = transformers.CLIPConfig.from_dict(values)
        assert ours.text_config.eos_token_id == (2 if deprecated is None else 49407)
        for mine, other in (
            (ours.text_config, theirs.text_config),
            (ours.vision_config, theirs.vision_config),
        ):
            for name, value in mine.to_dict().items():
                assert getattr(other, name) == value, name
        assert CLIPConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"quantization_config": {"bits": 4}}, "unknown field quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"model_type": "clip"}, "model_type='clip'"),
        ({"eos_token_id": [1, 2]}, "eos_token_id="),
        ({"hidden_size": 10, "num_attention_heads": 3}, "num_attention_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(values, message):
    for config, file in ((values, "a/config.json"), ({"text_config": values}, "a/config.json, text_config")):
        kind = CLIPTextConfig if config is values else CLIPConfig
        with pytest.raises(InputError, match=f"^{file}: ") as error:
            kind.from_dict(config, "a/config.json")
        assert message in str(error.value)


def test_wrong_input_shapes_are_refused(rng, clip):
    network, params, _ = clip
    with pytest.raises(ValueError, match="max_position_embeddings=13"):
        network.apply(params, token_ids(rng, 1, 14), method="text_features")
    with pytest.raises(ValueError, match="expected \\(64, 64, 3\\)"):
        network.apply(params, np.zeros((1, 32, 32, 3), np.float32), method="image_features")
