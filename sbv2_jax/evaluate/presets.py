"""The published protocols: COCO-2014 as SwiftBrush v2 and DMD2 measure it, and HPSv2's prompts.

None of their networks comes in a package: each is given by its path, and what is not given is not measured, which
the report says.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from sbv2_jax.convert.formats.component import load_config
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.data.prompts import open_prompts
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import resize
from sbv2_jax.evaluate.extractors import EXTRACTORS
from sbv2_jax.evaluate.extractors.image_text import open_image_text
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.pictures import Folder
from sbv2_jax.evaluate.protocol import Panel, Protocol

COCO_PICTURES = 30_000
_COCO_SIDE = 256
_PREFIX = "A photo depicts "
# What a flag gives, and what is measured with it.
_NEEDS = {
    "inception": "FID, KID and the Inception score need --inception, a directory of convert.py from-inception",
    "clip": "the CLIP score needs --clip, OpenCLIP's ViT-g-14 (laion2b_s12b_b42k) for the published figures",
    "hpsv2": "HPSv2 needs --hpsv2, OpenCLIP's ViT-H-14, and --hpsv2_weights, HPS_v2_compressed.pt",
    "cmmd": "CMMD needs --cmmd, OpenAI's CLIP ViT-L/14 for 336 px",
    "dinov2": "FD-DINOv2 needs --dinov2, DINOv2's ViT-L/14",
}
_REAL = ("inception", "cmmd", "dinov2")  # what is measured against real pictures


def coco30k_sbv2(
    *,
    prompts: str,
    column: str = "",
    real: str | None,
    weights: Mapping[str, str],
    count: int = COCO_PICTURES,
    official_bgr: bool = False,
) -> Protocol:
    """Returns SwiftBrush v2's protocol over the first `count` captions of a file, against all pictures of a folder.

    Both sides are cropped to the centre square and resized to 256 px by Lanczos. FID is clean-fid's "clean" (Parmar
    et al., 2022), precision and recall are of Inception with its own resize, k = 3; the published ones are of pictures
    whose red and blue are exchanged, which is `official_bgr`. `weights` gives the path of each network by its name.
    """
    inception = weights.get("inception")
    extra = ()
    if inception:
        extra = (
            Panel(
                label="inception, own resize" + (", bgr" if official_bgr else ""),
                open=functools.partial(
                    _exchanged if official_bgr else EXTRACTORS["inception-2015-resize"], inception
                ),
                metrics=(METRICS["precision_recall"], METRICS["density_coverage"]),
            ),
        )
    return _coco("coco30k-sbv2", prompts, column, real, weights, count, extra, ("inception", *_NEEDS))


def coco30k_dmd2(
    *,
    prompts: str,
    column: str = "",
    real: str | None,
    weights: Mapping[str, str],
    count: int = COCO_PICTURES,
) -> Protocol:
    """Returns DMD2's protocol (Yin et al., 2024): FID and CLIP score as SwiftBrush v2's, and no more.

    Its captions are a list of its own, one for each picture; its generated pictures are cut, not rounded, to uint8,
    which is not repeated here.
    """
    return _coco("coco30k-dmd2", prompts, column, real, weights, count, (), ("inception", "clip"))


def hpsv2(
    *, prompts: str, column: str = "", weights: Mapping[str, str], count: int | None = None
) -> Protocol:
    """Returns HPSv2's protocol (Wu et al., 2023): the mean score of one picture for each prompt of a file."""
    texts = _captions(prompts, column, count)
    return Protocol(
        name="hpsv2",
        prompts=texts,
        of=np.arange(len(texts)),
        panels=_panels(weights, ("hpsv2", "clip"), real=False),
        prepare=lambda picture: picture,
        prepared="as they are",
        absent=_absent(weights, ("hpsv2",)),
    )


def _coco(
    name: str,
    prompts: str,
    column: str,
    real: str | None,
    weights: Mapping[str, str],
    count: int,
    extra: Sequence[Panel],
    wanted: Sequence[str],
) -> Protocol:
    texts = _captions(prompts, column, count)
    panels = (*_panels(weights, wanted, real=real is not None), *(extra if real else ()))
    absent = _absent(weights, wanted)
    if real is None:
        absent += ("distances to real pictures need --real, the folder of COCO's val2014",)
    if not panels:
        raise InputError(f"nothing can be measured: {'; '.join(absent)}")
    return Protocol(
        name=name,
        prompts=texts,
        of=np.arange(len(texts)),
        panels=panels,
        prepare=functools.partial(resize.lanczos_crop, side=_COCO_SIDE),
        prepared=f"centre square, Lanczos to {_COCO_SIDE}",
        real=None if real is None else Folder(real),
        absent=absent,
    )


def _captions(place: str, column: str, count: int | None) -> list[str]:
    source = open_prompts(place, column)
    if count is not None and len(source) < count:
        raise InputError(
            f"{place} has {len(source)} prompts, and {count} are asked for: say --count={len(source)}"
        )
    return [source[index] for index in range(len(source) if count is None else count)]


def _absent(weights: Mapping[str, str], wanted: Sequence[str]) -> tuple[str, ...]:
    return tuple(_NEEDS[name] for name in dict.fromkeys(wanted) if not weights.get(name))


def _panels(weights: Mapping[str, str], wanted: Sequence[str], *, real: bool) -> tuple[Panel, ...]:
    """Returns the panels of the networks that are wanted and given."""
    panels = []
    for name in dict.fromkeys(wanted):
        path = weights.get(name)
        if not path or name in _REAL and not real:
            continue
        panels.append(_PANELS[name](path, weights))
    return tuple(panels)


def _inception(path: str, weights: Mapping[str, str]) -> Panel:
    # Other weights give other numbers: they are not called FID.
    published = getattr(load_config(resolve(path)), "is_published", False)
    return Panel(
        label="inception" if published else "an inception",
        open=functools.partial(EXTRACTORS["inception"], path),
        metrics=(METRICS["frechet"], METRICS["kernel"], METRICS["inception_score"]),
        names={"frechet": "FID", "kernel": "KID"} if published else {"frechet": "FD", "kernel": "KID"},
    )


def _clip(path: str, weights: Mapping[str, str]) -> Panel:
    return Panel(
        label="clip",
        open=functools.partial(open_image_text, path),
        metrics=(METRICS["clip_score"],),
        captions=True,
        prefix=_PREFIX,
        names={"clip_score": "CLIP score"},
    )


def _hpsv2(path: str, weights: Mapping[str, str]) -> Panel:
    return Panel(
        label="hpsv2",
        open=functools.partial(
            open_image_text, path, weights=weights.get("hpsv2_weights"), resized=resize.bicubic_then_pad
        ),
        metrics=(METRICS["hpsv2"],),
        captions=True,
        names={"hpsv2": "HPSv2"},
    )


def _cmmd(path: str, weights: Mapping[str, str]) -> Panel:
    return Panel(
        label="clip of CMMD",
        open=functools.partial(EXTRACTORS["clip"], path),
        metrics=(METRICS["cmmd"],),
        names={"cmmd": "CMMD"},
    )


def _dinov2(path: str, weights: Mapping[str, str]) -> Panel:
    return Panel(
        label="dinov2",
        open=functools.partial(EXTRACTORS["dinov2"], path),
        metrics=(METRICS["frechet"], METRICS["precision_recall"]),
        names={"frechet": "FD"},
    )


_PANELS = {"inception": _inception, "clip": _clip, "hpsv2": _hpsv2, "cmmd": _cmmd, "dinov2": _dinov2}


def _exchanged(path: str):
    """Opens Inception with its own resize, of pictures whose red and blue are exchanged."""

    def exchanged(picture: np.ndarray, side: int) -> np.ndarray:
        return resize.bilinear_2015(picture[..., ::-1], side)

    return EXTRACTORS["inception-2015-resize"](path, resized=exchanged)
