"""The OpenMoji world as a TFDS data set in array_record files, read without TensorFlow."""

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sbv2_jax.errors import InputError
from sbv2_jax.openmoji import render
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.identities import SPLITS
from sbv2_jax.openmoji.scenes import BACKGROUNDS, POSITIONS, SIZES

_DESCRIPTION = f"""
Captioned 64 px pictures: emoji drawings composed on coloured backgrounds, in two sizes and five positions,
with small rotations and, where a mirror image means the same, flips. Identities never cross splits.
{openmoji.ATTRIBUTION}. Names: English CLDR short names (Unicode licence).
The pictures are adapted from OpenMoji and stay under {openmoji.LICENCE}.
"""
_CITATION = """
@misc{openmoji, title={OpenMoji: the open-source emoji and icon project}, howpublished={openmoji.org},
  author={{HfG Schw{\\"a}bisch Gm{\\"u}nd, Benedikt Gro{\\ss}, Daniel Utz and contributors}},
  note={License: CC BY-SA 4.0}}
"""


class AnotherWorld(InputError):
    """Raised where files of the same name are of another seed, other identities or another number of pictures."""


@dataclasses.dataclass
class OpenMojiConfig(tfds.core.BuilderConfig):
    """The number of pictures of each split, which may be none, and the seed of the world."""

    train: int = 40_000
    validation: int = 5_000
    test: int = 10_000
    seed: int = 0


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """Builds `image`, `caption` and the facts `identity`, `background`, `size`, `position`.

    Use `sources(data_dir)`, which prepares it when needed and reads it back.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        OpenMojiConfig(name="full", description="40,000 training pictures"),
        OpenMojiConfig(
            name="small", description="2,000 training pictures", train=2_000, validation=250, test=500
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = {
            "attribution": openmoji.ATTRIBUTION,
            "licence": openmoji.LICENCE,
            "openmoji_version": render.openmoji_version(),
            "manifest": openmoji.manifest(self.builder_config.seed),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(render.RESOLUTION, render.RESOLUTION, 3)),
                    "caption": tfds.features.Text(),
                    "identity": tfds.features.Text(),
                    "background": tfds.features.ClassLabel(names=list(BACKGROUNDS)),
                    "size": tfds.features.ClassLabel(names=list(SIZES)),
                    "position": tfds.features.ClassLabel(names=list(POSITIONS)),
                }
            ),
            homepage="https://openmoji.org",
            citation=_CITATION,
            license=openmoji.LICENCE,
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,  # picture i of the files is picture i of the world
        )

    def _split_generators(self, dl_manager: Any) -> dict:
        return {split: self._generate_examples(split) for split in _splits(self.builder_config)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index in range(getattr(self.builder_config, split)):
            one = openmoji.example(split, index, self.builder_config.seed)
            facts = dataclasses.asdict(one.scene)
            yield index, {"image": _png(one.image), "caption": one.caption, **facts}


def _png(image: np.ndarray) -> io.BytesIO:
    """Encodes a picture, since TFDS would call TensorFlow to do it."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    png.seek(0)
    return png


def sources(data_dir: str, config: str | OpenMojiConfig = "full") -> dict:
    """Returns {split: random-access source of dicts}, preparing the files under `data_dir` the first time.

    `image` is uint8 [64, 64, 3], `caption` and `identity` are bytes, the other facts are class indices.
    Raises InputError when the [openmoji] extra is not installed, and AnotherWorld.
    """
    builder = OpenMoji(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    _check(builder)
    return {split: builder.as_data_source(split=split) for split in _splits(builder.builder_config)}


def _splits(config: OpenMojiConfig) -> list[str]:
    return [split for split in SPLITS if getattr(config, split)]


def _check(builder: OpenMoji) -> None:
    wanted = builder.builder_config
    found = json.loads((builder.data_path / "metadata.json").read_text())["manifest"]
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    if found != openmoji.manifest(wanted.seed) or any(counts.get(s, 0) != getattr(wanted, s) for s in SPLITS):
        raise AnotherWorld(
            f"{builder.data_path}: holds another OpenMoji world (seed {found['seed']}, pictures {counts}): "
            "remove it, or use another directory or config name"
        )
