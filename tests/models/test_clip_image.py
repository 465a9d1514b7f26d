"""CLIP's preprocessing against PyTorch, PIL and transformers' image processor."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sbv2_jax.errors import InputError
from sbv2_jax.models.clip_image import CLIP_MEAN, CLIP_STD, CLIPImageConfig, preprocess

ONLY_RESIZE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SHAPES = [
    (64, 64, 32),
    (64, 64, 224),
    (512, 512, 224),
    (100, 37, 32),
    (5, 7, 16),
    (33, 33, 33),
    (3, 3, 2),
    (1, 1, 4),
]


def noise(rng, height, width):
    return rng.integers(0, 256, (2, height, width, 3)).astype(np.uint8)


def smooth(size):
    """A picture without sharp edges, whose cubic interpolation does not leave [0, 255]."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(3 * x + 2 * y), np.cos(5 * x * y), np.sin(4 * y) * np.cos(3 * x)]
    return np.stack([np.uint8(np.round(128 + 90 * wave)) for wave in waves], axis=-1)[None]


def to_ours(pictures):
    return jnp.asarray(pictures / np.float32(127.5) - 1, jnp.float32)


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_resize_equals_torch_and_pil_on_noise(rng, height, width, size):
    pictures = noise(rng, height, width)
    ours = preprocess(to_ours(pictures), size, **ONLY_RESIZE)
    zero_to_one = pictures.astype(np.float32) / 255
    theirs = torch.nn.functional.interpolate(
        torch.tensor(zero_to_one).permute(0, 3, 1, 2), size=(size, size), mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), rtol=0, atol=2e-5)
    for channel in range(3):
        pil = Image.fromarray(zero_to_one[0, :, :, channel]).resize((size, size), Image.BICUBIC)
        np.testing.assert_allclose(ours[0, :, :, channel], np.asarray(pil), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("start", "size"), [(256, 64), (64, 224), (512, 224)])
def test_whole_preprocessing_equals_the_image_processor_within_its_rounding(start, size):
    picture = smooth(start)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    theirs = processor(Image.fromarray(picture[0]), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    ours = preprocess(to_ours(picture), size)
    # The processor rounds to 8 bits after each of the resize's two passes, and the second pass multiplies
    # the error of the first by up to 1.25, the sum of its absolute weights: 1.125 levels in all.
    levels = np.abs(ours - theirs) * np.asarray(CLIP_STD).reshape(1, 1, 1, 3) * 255
    assert levels.max() < 1.15


def test_values_outside_are_clipped_and_get_no_gradient():
    x = jnp.asarray([-3.0, -0.9, 0.9, 3.0]).reshape(1, 2, 2, 1) * jnp.ones((1, 1, 1, 3))
    out = preprocess(x, 2, **ONLY_RESIZE)
    np.testing.assert_allclose(out[0, :, :, 0].ravel(), [0.0, 0.05, 0.95, 1.0], atol=1e-6)
    gradient = jax.grad(lambda x: preprocess(x, 2, **ONLY_RESIZE).sum())(x)
    np.testing.assert_allclose(gradient[0, :, :, 0].ravel(), [0.0, 0.5, 0.5, 0.0], atol=1e-6)


def test_bfloat16_pictures_are_computed_in_float32(rng):
    x = to_ours(noise(rng, 64, 64)).astype(jnp.bfloat16)
    out = preprocess(x, 48)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, preprocess(x.astype(jnp.float32), 48).astype(jnp.bfloat16))


def test_constants_and_configurations_of_checkpoints(tmp_path):
    assert list(CLIP_MEAN) == transformers.image_utils.OPENAI_CLIP_MEAN
    assert list(CLIP_STD) == transformers.image_utils.OPENAI_CLIP_STD
    old = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "size": 224,
    }
    assert CLIPImageConfig.from_dict(old) == CLIPImageConfig()
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert CLIPImageConfig.from_dict(written) == CLIPImageConfig()

    small = CLIPImageConfig(size=64, crop_size=64, image_mean=(0.5, 0.5, 0.5))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(small.to_dict()))
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    assert theirs.size["shortest_edge"] == 64 and list(theirs.image_mean) == [0.5, 0.5, 0.5]
    assert CLIPImageConfig.from_dict(json.loads(json.dumps(small.to_dict()))) == small


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 2}, "resample=2 is not supported"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"size": {"height": 224, "width": 200}}, "size="),
        ({"size": 256}, "crop_size=224 differs from size=256"),
        ({"image_mean": [0.5]}, "image_mean="),
        ({"reduce_labels": True}, "unknown field reduce_labels"),
    ],
)
def test_an_unsupported_step_is_named(values, message):
    with pytest.raises(InputError) as error:
        CLIPImageConfig.from_dict(values)
    assert str(error.value).startswith("preprocessor_config.json: ") and message in str(error.value)
