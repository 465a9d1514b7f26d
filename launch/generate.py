"""Draws pictures from prompts: with a student in its one step or few, with a teacher in more.

python launch/generate.py --model=runs/openmoji/export --prompt="a red apple on a blue background" --out=apple.png
"""

import functools
from argparse import Namespace

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.fields import number, one_of, text, whole

FLAGS = (
    Flag("model", "A run, a diffusers directory, a hub id, or 'bundled'.", path, text(), required=True),
    Flag("prompt", "A prompt; may be given several times.", several=True),
    Flag("prompts", "A file of prompts instead: text, CSV, JSON, Parquet ...", path, text()),
    Flag("column", "The column or key of the prompts in that file.", default=""),
    Flag("out", "A .png file (several pictures become a grid), or a directory.", path, text(), required=True),
    Flag("num", "Pictures for each prompt.", int, whole(1), default=1),
    Flag("seed", "Seed of the noise.", int, whole(0, 2**32 - 1), default=0),
    Flag(
        "noise",
        "A .npy file of float32 noise [B, h, w, 4], instead of a seed; [B, STEPS, h, w, 4] for the 'lcm' sampler.",
        path,
        text(),
    ),
    Flag(
        "steps",
        "Steps. Default: those of a student of several, else 1; more sample a teacher.",
        int,
        whole(1),
    ),
    Flag("guidance", "Classifier-free guidance; 1 or less is none.", float, number(), default=1.0),
    Flag(
        "sampler",
        "The sampler of more than one step, 'ddim', 'dpm' or, of students, 'lcm'. Default: 'lcm' where the model has "
        "an LCMScheduler, else 'dpm'.",
        str,
        one_of("ddim", "dpm", "lcm"),
    ),
    Flag("negative_prompt", "What is not to be seen, in all pictures.", default=""),
    Flag(
        "negative_scale",
        "How strongly, where there is no guidance: attention is steered away from it.",
        float,
        number(0),
        default=0.5,
    ),
    Flag("height", "Pixels. Default: what the model was made for.", int, whole(1)),
    Flag("width", "Pixels.", int, whole(1)),
    Flag("precision", "Of the networks.", str, one_of("float32", "bfloat16"), "float32"),
    Flag("batch_size", "Pictures drawn at a time.", int, whole(1), default=16),
)


def main(given: Namespace) -> None:
    # jax is loaded only once the flags are right
    from sbv2_jax.devices.cache import use_cache
    from sbv2_jax.generate.draw import draw
    from sbv2_jax.run.drawn import drawn_of

    use_cache()
    draw(
        functools.partial(drawn_of, given.model, dtype=given.precision),
        given.out,
        prompts=given.prompt,
        prompts_file=given.prompts,
        column=given.column,
        num=given.num,
        seed=given.seed,
        noise_file=given.noise,
        steps=given.steps,
        guidance=given.guidance,
        sampler=given.sampler,
        batch_size=given.batch_size,
        negative_prompt=given.negative_prompt,
        negative_scale=given.negative_scale,
        height=given.height,
        width=given.width,
        precision=given.precision,
    )


def command() -> None:
    """The command, as it is installed."""
    cli.run_flags(main, FLAGS, __doc__)


if __name__ == "__main__":
    command()
