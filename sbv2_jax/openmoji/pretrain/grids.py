"""Pictures to look at while a pipeline is trained: rows of reconstructions, and samples beside real pictures."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_SCALE, _MARGIN, _LINE = 2, 4, 11


def write_rows(path: Path, *rows: np.ndarray, columns: int = 16) -> None:
    """Writes pictures one below the other: uint8 [N, H, W, 3] each row, wrapped after `columns`."""
    count, height, width, _ = rows[0].shape
    blocks = range(0, count, columns)
    canvas = np.full((len(blocks) * (len(rows) * height + _MARGIN), columns * width, 3), 255, np.uint8)
    for block, start in enumerate(blocks):
        for line, row in enumerate(rows):
            top = block * (len(rows) * height + _MARGIN) + line * height
            for column, picture in enumerate(row[start : start + columns]):
                canvas[top : top + height, column * width : (column + 1) * width] = picture
    _save(path, Image.fromarray(canvas))


def write_captioned(
    path: Path, captions: Sequence[str], samples: np.ndarray, real: np.ndarray, columns: int = 8
) -> None:
    """Writes each sample, with a real picture of its caption at half the size, above the caption.

    samples, real uint8 [N, H, W, 3].
    """
    side = samples.shape[1] * _SCALE
    half = side // 2
    cell_width, cell_height = side + half + 2 * _MARGIN, side + 3 * _LINE + 2 * _MARGIN
    lines = -(-len(captions) // columns)
    canvas = Image.new("RGB", (columns * cell_width, lines * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, caption in enumerate(captions):
        left, top = index % columns * cell_width, index // columns * cell_height
        canvas.paste(
            Image.fromarray(samples[index]).resize((side, side), Image.Resampling.BICUBIC), (left, top)
        )
        canvas.paste(Image.fromarray(real[index]).resize((half, half)), (left + side, top))
        text = "\n".join(textwrap.wrap(caption, 32)[:3])
        draw.multiline_text((left, top + side + 1), text, fill="black", spacing=0, font_size=_LINE - 1)
    _save(path, canvas)


def _save(path: Path, image: Image.Image) -> None:
    scratch = path.with_name(f".{path.name}")
    image.save(scratch, "PNG")
    os.replace(scratch, path)  # whoever looks at it never sees half a file
