"""Measures pictures by a published protocol, or by the OpenMoji world's, and writes a report.

python launch/evaluate.py --protocol=openmoji --model=bundled,steps=8,guidance=2 --model=runs/openmoji \
    --out=runs/quality
python launch/evaluate.py --protocol=openmoji --split=validation --model=bundled --steps=1,4,25 \
    --guidance=1:7.5:0.5 --out=runs/sweep
python launch/evaluate.py --protocol=coco30k-sbv2 --prompts=annotations/captions_val2014.json --real=val2014 \
    --inception=inception --clip=ViT-g-14 --model=runs/full --out=runs/coco

Killed and started again, it goes on. Each row after the first is compared with the first.
"""

import functools
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.errors import InputError
from sbv2_jax.fields import one_of, text, whole

if TYPE_CHECKING:
    from sbv2_jax.evaluate.pictures import Pictures
    from sbv2_jax.evaluate.protocol import Protocol

KINDS = ("seen", "recombined", "held_out")
JUDGES = ("efficientnet-lite0", "efficientnet-lite2")
_HPSV2 = ("hpsv2", "hpsv2_weights")
NETWORKS = ("inception", "clip", *_HPSV2, "cmmd", "dinov2")
# The flags that not every protocol takes.
TAKES = {
    "openmoji": ("images", "kind", "split", "judge", "clip"),
    "coco30k-sbv2": ("prompts", "column", "real", *NETWORKS, "channels"),
    "coco30k-dmd2": ("prompts", "column", "real", "inception", "clip"),
    "hpsv2": ("prompts", "column", *_HPSV2, "clip"),
}
FLAGS = (
    Flag("protocol", f"One of {', '.join(TAKES)}.", str, one_of(*TAKES), required=True),
    Flag(
        "model",
        "A pipeline (a directory, a hub id, 'bundled'), or a run; may be given several times. Settings of its own "
        "follow with commas: steps=, guidance=, sampler=, of a run step= and which=student|ema.",
        path,
        text(),
        several=True,
    ),
    Flag(
        "pictures",
        "A folder of a picture for each prompt, or 'real'; may be given several times.",
        path,
        text(),
        several=True,
    ),
    Flag("merge", "Two models, A,B: their weighted sums for each --weight.", path, text()),
    Flag("weight", "Weights of A: numbers, or FIRST:LAST:BETWEEN. Default: 0:1:0.1."),
    Flag("steps", "Steps: numbers with commas. Default: those of a student of several, else 1."),
    Flag("guidance", "Guidance: numbers with commas, or FIRST:LAST:BETWEEN.", default="1"),
    Flag(
        "sampler",
        "The sampler of more than one step, 'ddim', 'dpm' or, of students, 'lcm'. Default: as for launch/generate.py.",
        str,
        one_of("ddim", "dpm", "lcm"),
    ),
    Flag(
        "seed",
        "Seed of the noise; may be given several times. Default: 0.",
        int,
        whole(0, 2**32 - 1),
        several=True,
    ),
    Flag("out", "The directory of the report.", path, text(), required=True),
    Flag("count", "Prompts. Default: the protocol's own number.", int, whole(2)),
    Flag("images", "Pictures of each prompt (openmoji). Default: 1.", int, whole(1)),
    Flag("kind", f"Which prompts (openmoji): {', '.join(KINDS)}. Default: recombined.", str, one_of(*KINDS)),
    Flag(
        "split",
        "Prompts to choose settings by, 'validation', or to report, 'test' (openmoji). Default: test.",
        str,
        one_of("validation", "test"),
    ),
    Flag(
        "judge",
        f"A network that sees pictures (openmoji): {', '.join(JUDGES)}. May be given several times. Default: both; one "
        "alone is quicker, and gives no verdict.",
        str,
        one_of(*JUDGES),
        several=True,
    ),
    Flag("prompts", "The file of captions.", path, text()),
    Flag("column", "The column or key of the captions in that file."),
    Flag("real", "The folder of real pictures.", path, text()),
    Flag("inception", "Inception's weights: a directory of convert.py from-inception.", path, text()),
    Flag("clip", "The CLIP of the CLIP score, in the layout of transformers or OpenCLIP.", path, text()),
    Flag("hpsv2", "The ViT-H-14 of HPSv2, in OpenCLIP's layout.", path, text()),
    Flag("hpsv2_weights", "The weights of HPSv2, HPS_v2_compressed.pt.", path, text()),
    Flag("cmmd", "The CLIP of CMMD.", path, text()),
    Flag("dinov2", "DINOv2, in the layout of transformers.", path, text()),
    Flag(
        "channels",
        "Order of colours for precision and recall, 'rgb', or 'bgr' as in the published figures. Default: rgb.",
        str,
        one_of("rgb", "bgr"),
    ),
    Flag("batch_size", "Pictures drawn at a time.", int, whole(1), default=64),
)


def main(given: Namespace) -> None:
    foreign = {name for names in TAKES.values() for name in names} - {*TAKES[given.protocol]}
    if wrong := [f"--{flag.name}" for flag in FLAGS if flag.name in foreign and getattr(given, flag.name)]:
        raise InputError(f"--protocol={given.protocol} does not take {', '.join(wrong)}")
    if given.weight and not given.merge:
        raise InputError("--weight is of a --merge")
    # jax is loaded only once the flags are right
    from sbv2_jax.devices.cache import use_cache, user_cache
    from sbv2_jax.run import evaluation

    use_cache()
    protocol, real = _protocol(given)
    evaluation.run(
        protocol,
        models=given.model,
        merge=given.merge,
        folders=given.pictures,
        real=real,
        steps=given.steps,
        guidance=given.guidance,
        weight=given.weight or "0:1:0.1",
        sampler=given.sampler,
        seeds=tuple(dict.fromkeys(given.seed)) or (0,),
        batch_size=given.batch_size,
        out=Path(given.out),
        cache=user_cache() / "references",
        command=f"{cli.command('evaluate')} {shlex.join(sys.argv[1:])}",
    )


def _protocol(given: Namespace) -> "tuple[Protocol, Pictures | None]":
    """Returns the protocol that was asked for, and the real pictures of its own prompts, where it has them."""
    if given.protocol == "openmoji":
        from sbv2_jax.evaluate.extractors.image_text import open_image_text
        from sbv2_jax.openmoji.protocol import openmoji, real_pictures

        kind, split = given.kind or "recombined", given.split or "test"
        count, images = given.count or 2000, given.images or 1
        clip = functools.partial(open_image_text, given.clip) if given.clip else None
        judges = tuple(dict.fromkeys(given.judge)) or JUDGES
        protocol = openmoji(kind=kind, split=split, count=count, images=images, judges=judges, clip=clip)
        return protocol, real_pictures(kind=kind, split=split, count=count, images=images)
    from sbv2_jax.evaluate import presets

    cli.require(given, ["prompts"], f"--protocol={given.protocol}")
    weights = {name: getattr(given, name) for name in NETWORKS if getattr(given, name)}
    common = {"prompts": given.prompts, "column": given.column or "", "weights": weights}
    if given.protocol == "hpsv2":
        return presets.hpsv2(**common, count=given.count), None
    common |= {"real": given.real, "count": given.count or presets.COCO_PICTURES}
    if given.protocol == "coco30k-dmd2":
        return presets.coco30k_dmd2(**common), None
    return presets.coco30k_sbv2(**common, official_bgr=given.channels == "bgr"), None


def command() -> None:
    """The command, as it is installed."""
    cli.run_flags(main, FLAGS, __doc__)


if __name__ == "__main__":
    command()
