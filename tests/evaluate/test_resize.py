"""The protocols' resizing against clean-fid's own file, torch-fidelity's own, and PIL's own words."""

import numpy as np
import pytest
import torch
from PIL import Image
from their_judges import cleanfid, fidelity

from sbv2_jax.evaluate import resize

SHAPES = [(64, 64, 299), (512, 512, 299), (427, 640, 299), (640, 427, 224), (31, 50, 17), (1, 3, 5)]
BOUND = 1e-3  # on 0 to 255


def noise(rng, height, width):
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "side"), SHAPES)
def test_float_bicubic_is_that_of_clean_fid(rng, height, width, side):
    picture = noise(rng, height, width)
    theirs = cleanfid("resize").make_resizer("PIL", False, "bicubic", (side, side))(picture)
    ours = resize.bicubic_float(picture, side)
    assert ours.dtype == np.float32 and theirs.std() > 10
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("height", "width", "side"), SHAPES)
def test_bilinear_of_2015_is_that_of_torch_fidelity(rng, height, width, side):
    picture = noise(rng, height, width)
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(picture).permute(2, 0, 1)[None].float(), size=(side, side), align_corners=False
    )
    ours = resize.bilinear_2015(picture, side)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), rtol=0, atol=BOUND)


@pytest.mark.parametrize(("height", "width", "side"), [(512, 512, 256), (427, 640, 256), (641, 426, 256)])
def test_lanczos_crop_is_that_of_pil_on_the_centre_square(rng, height, width, side):
    picture, short = noise(rng, height, width), min(height, width)
    # torchvision's center_crop, by hand: the margin to the nearest whole number, halves to the even one
    top, left = int(round((height - short) / 2.0)), int(round((width - short) / 2.0))
    square = Image.fromarray(picture).crop((left, top, left + short, top + short))
    np.testing.assert_array_equal(
        resize.lanczos_crop(picture, side), square.resize((side, side), Image.LANCZOS)
    )


def test_what_is_not_square_is_squeezed_cropped_or_padded(rng):
    picture = np.repeat(np.repeat(noise(rng, 3, 5), 40, axis=0), 40, axis=1)  # 120 x 200, of large tiles
    assert (resize.bicubic(picture, 30)[5, [3, 27]] == picture[20, [20, 180]]).all()
    cropped = resize.bicubic_then_crop(picture, 30)
    assert cropped.shape == (30, 30, 3) and (cropped[5, 15] == picture[20, 100]).all()
    np.testing.assert_array_equal(
        cropped, np.asarray(Image.fromarray(picture).resize((50, 30), Image.BICUBIC))[:, 10:40]
    )
    first = resize.crop_then_bicubic(picture, 30)
    expected = Image.fromarray(picture[:, 40:160]).resize((30, 30), Image.BICUBIC)
    np.testing.assert_array_equal(first, expected)
    padded = resize.bicubic_then_pad(picture, 30)
    np.testing.assert_array_equal(padded[6:24], Image.fromarray(picture).resize((30, 18), Image.BICUBIC))
    assert not padded[:6].any() and not padded[24:].any()
    square = noise(rng, 64, 64)
    for how in (resize.bicubic_then_crop, resize.bicubic_then_pad, resize.crop_then_bicubic):
        np.testing.assert_array_equal(how(square, 30), resize.bicubic(square, 30))
