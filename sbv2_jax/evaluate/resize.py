"""A picture made square and of another size, as published protocols do it: by PIL, whose rounding is part of them.

Every function takes a picture, uint8 [H, W, 3], and the side in pixels, and returns [side, side, 3].
"""

import numpy as np
from PIL import Image


def bicubic_float(picture: np.ndarray, side: int) -> np.ndarray:
    """Bicubic in float32, each channel on its own, clipped to 0..255; what is not square is squeezed.

    clean-fid's resize of mode "clean" (Parmar et al., 2022), for FID.
    """
    channels = [
        Image.fromarray(np.ascontiguousarray(picture[:, :, channel], np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        for channel in range(picture.shape[2])
    ]
    return np.stack([np.asarray(channel).clip(0.0, 255.0) for channel in channels], axis=-1)


def bicubic(picture: np.ndarray, side: int) -> np.ndarray:
    """Bicubic in uint8; what is not square is squeezed. dgm-eval's, for FD-DINOv2 (Stein et al., 2023)."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def bicubic_then_crop(picture: np.ndarray, side: int) -> np.ndarray:
    """Bicubic in uint8 to the shorter side, then the centre: OpenCLIP's, for the CLIP score."""
    height, width = picture.shape[:2]
    # torchvision rounds the longer side down
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return _centre(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)), side)


def bicubic_then_pad(picture: np.ndarray, side: int) -> np.ndarray:
    """Bicubic in uint8 to the longer side, in the middle of black: OpenCLIP's of mode "longest", for HPSv2."""
    factor = side / max(picture.shape[:2])
    height, width = (round(length * factor) for length in picture.shape[:2])
    small = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    out = np.zeros((side, side, picture.shape[2]), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = small
    return out


def crop_then_bicubic(picture: np.ndarray, side: int) -> np.ndarray:
    """The centre square, then bicubic in uint8: that of CMMD's code (Jayasumana et al., 2024)."""
    height, width = picture.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return bicubic(picture[top : top + short, left : left + short], side)


def lanczos_crop(picture: np.ndarray, side: int) -> np.ndarray:
    """The centre square, then Lanczos in uint8: what SwiftBrush v2's evaluation does to both sides, to 256."""
    square = _centre(picture, min(picture.shape[:2]))
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.LANCZOS))


def bilinear_2015(picture: np.ndarray, side: int) -> np.ndarray:
    """Bilinear in float32 without antialiasing, corners at corners: that inside the Inception graph of 2015.

    What is not square is squeezed. OpenAI's evaluation, whose precision and recall SwiftBrush v2 reports, and
    torch-fidelity resize so.
    """
    x = picture.astype(np.float32)
    for axis, length in enumerate(picture.shape[:2]):
        # pixel i is read at i * before / after
        places = np.arange(side, dtype=np.float32) * np.float32(length / side)
        lower = np.minimum(places.astype(int), length - 1)
        upper = np.minimum(lower + 1, length - 1)
        share = (places - lower.astype(np.float32)).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        below = x.take(lower, axis)
        x = below + (x.take(upper, axis) - below) * share
    return x


def _centre(picture: np.ndarray, side: int) -> np.ndarray:
    # torchvision rounds the margin to the nearest whole number, halves to the even one
    top, left = (round((length - side) / 2) for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]
