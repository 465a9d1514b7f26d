"""The published protocols: COCO-2014 as SwiftBrush v2 and DMD2 measure it, and HPSv2's prompts.

None of their networks comes in a package: each is given by its path, and what is not given is not measured, which
the report says.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sbv2_jax.convert.formats.component import load_config
from sbv2_jax.convert.formats.resolve import resolve
from sbv2_jax.data.prompts import open_prompts, places
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import resize
from sbv2_jax.evaluate.extractors import EXTRACTORS
from sbv2_jax.evaluate.extractors.extractor import Extractor
from sbv2_jax.evaluate.extractors.image_text import open_image_text
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.metrics.hpsv2 import HPSv2
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
    extra: tuple[Panel, ...] = ()
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
    """Returns HPSv2's protocol (Wu et al., 2023): the mean score of one picture for each prompt.

    `prompts` are files, as for training, each of a style that its name says (anime.json, photo.json ...); `count`
    takes that many of each.
    """
    parts = {Path(place).stem: _captions(place, column, count) for place in places(prompts)}
    texts = [text for part in parts.values() for text in part]
    styles = [style for style, part in parts.items() for _ in part] if len(parts) > 1 else []
    if not weights.get("hpsv2"):
        raise InputError(f"nothing can be measured: {_NEEDS['hpsv2']}")
    return Protocol(
        name="hpsv2",
        prompts=texts,
        of=np.arange(len(texts)),
        panels=_panels(weights, ("hpsv2", "clip"), real=False, styles=styles),
        prepare=lambda picture: picture,
        prepared="as they are",
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
    if real is None and (given := [f"--{name}" for name in _REAL if weights.get(name)]):
        raise InputError(f"{', '.join(given)}: distances to real pictures need --real, the folder of val2014")
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


def _panels(
    weights: Mapping[str, str], wanted: Sequence[str], *, real: bool, styles: Sequence[str] = ()
) -> tuple[Panel, ...]:
    """Returns the panels of the networks that are wanted and given."""
    panels = []
    for name in dict.fromkeys(wanted):
        path = weights.get(name)
        if not path or name in _REAL and not real:
            continue
        panels.append(_hpsv2(path, weights, styles) if name == "hpsv2" else _PANELS[name](path))
    return tuple(panels)


def _inception(path: str) -> Panel:
    # Other weights give other numbers: they are not called FID.
    published = getattr(load_config(resolve(path)), "is_published", False)
    return Panel(
        label="inception" if published else "an inception",
        open=functools.partial(EXTRACTORS["inception"], path),
        metrics=(METRICS["frechet"], METRICS["kernel"], METRICS["inception_score"]),
        names={"frechet": "FID", "kernel": "KID"} if published else {"frechet": "FD", "kernel": "KID"},
    )


def _clip(path: str) -> Panel:
    return Panel(
        label="clip",
        open=functools.partial(open_image_text, path),
        metrics=(METRICS["clip_score"],),
        captions=True,
        prefix=_PREFIX,
        names={"clip_score": "CLIP score"},
    )


def _hpsv2(path: str, weights: Mapping[str, str], styles: Sequence[str]) -> Panel:
    directory = Path(path)
    if not weights.get("hpsv2_weights") and (directory / "open_clip_config.json").exists():
        raise InputError(
            f"--hpsv2={path}: OpenCLIP's own weights are no HPSv2: --hpsv2_weights=HPS_v2_compressed.pt"
        )
    return Panel(
        label="hpsv2",
        open=functools.partial(
            open_image_text, path, weights=weights.get("hpsv2_weights"), resized=resize.bicubic_then_pad
        ),
        metrics=(HPSv2(styles=styles),),
        captions=True,
        names={figure: figure.replace("hpsv2", "HPSv2") for figure in HPSv2(styles=styles).better},
    )


def _cmmd(path: str) -> Panel:
    return Panel(
        label="clip of CMMD",
        open=functools.partial(EXTRACTORS["clip"], path),
        metrics=(METRICS["cmmd"],),
        names={"cmmd": "CMMD"},
    )


def _dinov2(path: str) -> Panel:
    return Panel(
        label="dinov2",
        open=functools.partial(EXTRACTORS["dinov2"], path),
        metrics=(METRICS["frechet"], METRICS["precision_recall"]),
        names={"frechet": "FD"},
    )


_PANELS = {"inception": _inception, "clip": _clip, "cmmd": _cmmd, "dinov2": _dinov2}


def _exchanged(path: str) -> Extractor:
    """Opens Inception with its own resize, of pictures whose red and blue are exchanged."""

    def exchanged(picture: np.ndarray, side: int) -> np.ndarray:
        return resize.bilinear_2015(picture[..., ::-1], side)

    return EXTRACTORS["inception-2015-resize"](path, resized=exchanged)
