"""Pictures on disk: PNG files and grids."""

import contextlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sbv2_jax.errors import InputError


def save_png(path: str | Path, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], in one rename, so that no reader sees half of it.

    Raises InputError where it cannot be written; nothing of it is left then.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(scratch, format="PNG")
        os.replace(scratch, path)
    except OSError as error:
        # what PIL left of it; where the directory is none, there is nothing
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


class PngWriter:
    """Writes batches of pictures as PNG files, each while the next is drawn: compressing one of 512 px takes 0.1 s.

    A context: on the way out all is written. Raises InputError as `save_png` does, for the batch before.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(thread_name_prefix="png")
        self._writing: list[Future] = []

    def write(self, paths: Sequence[Path], pictures: Sequence[np.ndarray] | np.ndarray) -> None:
        """Begins to write a batch, after the one before is written."""
        self._wait()
        self._writing = [self._pool.submit(save_png, *each) for each in zip(paths, pictures, strict=True)]

    def _wait(self) -> None:
        writing, self._writing = self._writing, []
        for each in writing:
            each.result()

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()


def grid(columns: dict[str, np.ndarray], captions: Sequence[str], *, scale: int = 1) -> np.ndarray:
    """Returns a table of pictures, uint8 [H, W, 3]: a named column for each entry, a captioned row for each prompt.

    Every column is uint8 [rows, h, w, 3]; `scale` repeats the pixels of small pictures.
    """
    pictures = {name: batch.repeat(scale, 1).repeat(scale, 2) for name, batch in columns.items()}
    height, width = next(iter(pictures.values())).shape[1:3]
    font, margin = ImageFont.load_default(size=12), 4
    text_width = max(int(font.getlength(caption)) for caption in captions) + 2 * margin
    names = {name: _wrapped(name, font, width) for name in pictures}
    header = 5 + 15 * max(map(len, names.values()))
    canvas = Image.new(
        "RGB",
        (text_width + len(pictures) * (width + margin), header + len(captions) * (height + margin)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for column, (name, batch) in enumerate(pictures.items()):
        left = text_width + column * (width + margin)
        for line, words in enumerate(names[name]):
            draw.text((left, 2 + 15 * line), words, fill="black", font=font)
        for row, picture in enumerate(batch):
            canvas.paste(Image.fromarray(picture), (left, header + row * (height + margin)))
    for row, caption in enumerate(captions):
        draw.text(
            (margin, header + row * (height + margin) + height // 2 - 8), caption, fill="black", font=font
        )
    return np.asarray(canvas)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Returns text in lines of so many pixels, broken between words, and within one that is longer."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def tile(pictures: np.ndarray) -> np.ndarray:
    """Returns pictures, uint8 [N, H, W, 3], as one, side by side in rows of about equal number."""
    count, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[:count] = pictures
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return sheet.reshape(rows * height, columns * width, channels)
