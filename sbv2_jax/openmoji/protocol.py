"""The protocol of the OpenMoji world: prompts whose combinations training never saw, real pictures of them beside."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sbv2_jax.evaluate.extractors import EXTRACTORS
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.pictures import Made
from sbv2_jax.evaluate.protocol import Panel, Protocol
from sbv2_jax.openmoji import scenes, world
from sbv2_jax.openmoji.facts import Facts

# The judges: networks of ImageNet, which no part of the method has seen.
JUDGES = ("efficientnet-lite0", "efficientnet-lite2")
_SETS = ("frechet", "kernel", "precision_recall", "density_coverage")
_NAMES = {"frechet": "FD", "kernel": "KID"}
_FITTED = 8000  # real pictures to which the classifiers are fitted
_FITTED_SEED = 1  # other draws than those of the teacher's training pictures


def openmoji(
    *,
    kind: str = "recombined",
    split: str = "test",
    count: int = 2000,
    images: int = 1,
    judges: Sequence[str] = JUDGES,
    clip: Callable | None = None,
) -> Protocol:
    """Returns the protocol over `count` prompts of one kind, with `images` pictures of each (see `world.prompts`).

    "validation" is to choose settings by, "test" to report. `judges` are the networks that see pictures: one alone is
    quicker, and gives no verdict. `clip` opens the network that sees captions.
    """
    prompts = world.prompts(kind, count, split)
    others = world.prompts(kind, 2 * count, split)[count:]
    shown = [one.scene for one in prompts for _ in range(images)]
    fitted = [scenes.scene("train", index, _FITTED_SEED) for index in range(_FITTED)]
    sha = world.manifest()["sha256"]

    def real(index: int) -> np.ndarray:
        return others[index].reference()

    metrics = (
        *(METRICS[one] for one in _SETS),
        Facts(scenes=shown, train_scenes=fitted),
        METRICS["nearest_train"],
        *([METRICS["diversity"]] if images > 1 else []),
    )
    panels = [
        Panel(
            label=name,
            open=EXTRACTORS[name],
            metrics=metrics,
            names=_NAMES,
        )
        for name in judges
    ]
    if clip is not None:
        names = {"clip_score": "CLIP score"}
        score = (METRICS["clip_score"],)
        panels.append(Panel(label="clip", open=clip, metrics=score, captions=True, names=names))
    rule = JUDGES if set(judges) >= set(JUDGES) else ()
    return Protocol(
        name=f"openmoji, {kind} prompts of {split}",
        prompts=[one.caption for one in prompts for _ in range(images)],
        of=np.repeat(np.arange(count), images),
        panels=tuple(panels),
        prepare=lambda picture: picture,
        prepared="as they are",
        real=Made(f"real {kind} {split} {count} {sha}", count, real),
        train=Made(
            f"train {_FITTED} {_FITTED_SEED} {sha}",
            _FITTED,
            lambda index: world.example("train", index, _FITTED_SEED).image,
        ),
        decisive=tuple((name, figure) for name in rule for figure in _NAMES.values()),
        guarded=tuple((name, figure) for name in rule for figure in ("recall", "drawing")),
    )


def in_training(count: int) -> Protocol:
    """Returns a small protocol for `config.evaluate`: validation prompts, and Lite0's figures alone."""
    whole = openmoji(split="validation", count=count, judges=JUDGES[:1])
    (kept,) = whole.panels
    metrics = tuple(one for one in kept.metrics if one.name in ("frechet", "kernel", "facts"))
    return dataclasses.replace(whole, panels=(dataclasses.replace(kept, metrics=metrics),))


def real_pictures(*, kind: str, split: str, count: int, images: int) -> Made:
    """Returns real pictures of the protocol's own prompts: the row that no model passes."""
    prompts = world.prompts(kind, count, split)
    name = f"real pictures of {kind} prompts, {split}, {count} x {images}, {world.manifest()['sha256']}"
    return Made(name, count * images, lambda row: prompts[row // images].reference())
