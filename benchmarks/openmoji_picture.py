"""Draws docs/openmoji.png: the teacher in many steps and in one, and the student, for the same captions and noise.

python benchmarks/openmoji_picture.py --model=runs/openmoji/export --out=docs/openmoji.png

The captions are the first of the test split: combinations that training never holds, none chosen.
"""

import textwrap
from argparse import Namespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sbv2_jax
from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.fields import number, text, whole
from sbv2_jax.generate.pictures import save_png
from sbv2_jax.openmoji import world

FLAGS = (
    Flag("model", "The student: a diffusers directory.", path, text(), required=True),
    Flag("teacher", "Its teacher.", path, text(), default="bundled"),
    Flag("steps", "Steps of the teacher.", int, whole(2), default=25),
    Flag("guidance", "Guidance of those steps.", float, number(0), default=2.0),
    Flag("count", "Captions.", int, whole(1), default=10),
    Flag("out", "The picture.", path, text(), required=True),
)
_SCALE, _MARGIN, _NAMES, _LINE, _LINES = 2, 4, 92, 14, 4


def main(given: Namespace) -> None:
    use_cache()
    captions = [one.caption for one in world.prompts("recombined", given.count)]
    teacher, student = sbv2_jax.load(given.teacher), sbv2_jax.load(given.model)
    rows = {
        f"teacher,\n{given.steps} steps": teacher.draw(captions, steps=given.steps, guidance=given.guidance),
        "teacher,\n1 step": teacher.draw(captions),
        "student,\n1 step": student.draw(captions),
    }
    save_png(given.out, table(rows, captions))


def table(rows: dict[str, np.ndarray], captions: list[str]) -> np.ndarray:
    """Returns a named row of pictures for each entry, uint8 [N, H, W, 3], above the captions of the columns."""
    side = next(iter(rows.values())).shape[1] * _SCALE
    size = (_NAMES + len(captions) * (side + _MARGIN), len(rows) * (side + _MARGIN) + _LINES * _LINE)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_LINE - 2)
    for line, (name, pictures) in enumerate(rows.items()):
        top = line * (side + _MARGIN)
        draw.multiline_text((_MARGIN, top + side // 2 - _LINE), name, fill="black", font=font)
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(shown, (_NAMES + column * (side + _MARGIN), top))
    for column, caption in enumerate(captions):
        said = "\n".join(textwrap.wrap(caption, 20)[:_LINES])
        draw.multiline_text(
            (_NAMES + column * (side + _MARGIN), len(rows) * (side + _MARGIN)), said, "black", font, spacing=1
        )
    return np.asarray(canvas)


if __name__ == "__main__":
    cli.run_flags(main, FLAGS, __doc__)
