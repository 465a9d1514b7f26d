"""The OpenMoji world: captioned pictures, prompts for distillation and for evaluation, and its manifest.

Everything is a pure function of (seed, index). Captions and prompts need no extra package; pictures need the
[openmoji] extra. The drawings are by OpenMoji, CC BY-SA 4.0; the names are English CLDR short names.
"""

import dataclasses
import hashlib
import json
from typing import SupportsIndex

import numpy as np

from sbv2_jax.openmoji import render, scenes
from sbv2_jax.openmoji.draws import uniforms
from sbv2_jax.openmoji.identities import SPLITS, identities
from sbv2_jax.openmoji.scenes import Scene

LICENCE = "CC BY-SA 4.0"
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"
PROMPT_KINDS = ("seen", "recombined", "held_out")


@dataclasses.dataclass(frozen=True)
class Example:
    """A captioned picture: uint8 [64, 64, 3], its caption, and the facts of its scene."""

    image: np.ndarray
    caption: str
    scene: Scene


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of evaluation: the caption, the facts it says, and the key of its reference picture."""

    caption: str
    scene: Scene
    key: tuple

    def reference(self) -> np.ndarray:
        """Returns a real picture of this prompt, uint8 [64, 64, 3]."""
        return render.compose(self.scene, self.key)


def caption(split: str, index: int, seed: int = 0) -> str:
    """Returns the caption of picture `index` of a split."""
    return scenes.caption(scenes.scene(split, index, seed), uniforms(seed, "caption", split, index))


def example(split: str, index: int, seed: int = 0) -> Example:
    """Returns picture `index` of a split ("train", "validation", "test": identities never shared).

    Raises InputError when the [openmoji] extra is not installed.
    """
    scene = scenes.scene(split, index, seed)
    image = render.compose(scene, (seed, "augment", split, index))
    return Example(image, caption(split, index, seed), scene)


def prompts(kind: str, count: int, split: str = "test", seed: int = 0) -> list[Prompt]:
    """Returns `count` prompts of one kind for evaluation, each stating every fact of its scene.

    "seen": names of training in combinations that training may hold, with other augmentations.
    "recombined": names of training in a combination (name, background, size, position) that it never holds.
    "held_out": names that training never holds. `split` is "validation" (to choose settings) or "test" (to
    report); the withheld combinations and the held-out names of the two are disjoint.
    """
    if kind not in PROMPT_KINDS:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(PROMPT_KINDS)}")
    if split not in SPLITS[1:]:
        raise ValueError(f"split {split!r}: prompts are for validation or test")
    pool = identities(split if kind == "held_out" else "train")
    of = {"seen": "train", "recombined": split, "held_out": None}[kind]

    def one(index: int) -> Prompt:
        stream = f"{kind}-{split}"
        scene = scenes.draw_scene(pool, uniforms(seed, "scene", stream, index), of)
        text = scenes.caption(scene, uniforms(seed, "caption", stream, index), full=True)
        return Prompt(text, scene, (seed, "augment", stream, index))

    return [one(index) for index in range(count)]


class Captions:
    """The captions of the training split as a prompt source for distillation: no file, no extra package."""

    def __init__(self, count: int = 50_000, seed: int = 0):
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> str:
        index = int(index)
        if not 0 <= index < self._count:
            raise IndexError(f"caption {index} of {self._count}")
        return caption("train", index, self._seed)

    def __repr__(self) -> str:
        return f"Captions(count={self._count}, seed={self._seed})"

    def fingerprint(self) -> str:
        """Returns the SHA-256 that stands for these captions."""
        return hashlib.sha256(f"{manifest(self._seed)['sha256']}/{self._count}".encode()).hexdigest()


class Pictures:
    """The training split's pictures and captions, by number: (uint8 [64, 64, 3], caption), drawn when they are read."""

    def __init__(self, count: int = 40_000, seed: int = 0):
        self._captions, self._seed = Captions(count, seed), seed

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        text = self._captions[index]  # which knows what is no picture of these
        return example("train", index, self._seed).image, text

    def __repr__(self) -> str:
        return f"Pictures(count={len(self)}, seed={self._seed})"

    def fingerprint(self) -> str:
        """Returns the SHA-256 that stands for these pictures."""
        return self._captions.fingerprint()


def manifest(seed: int = 0) -> dict:
    """Returns what names this world in a result: a SHA-256 over identities, splits, scenes and the seed.

    The fields are `sha256`, `seed`, and the number of identities a split.
    """
    facts = {
        "identities": [[*dataclasses.astuple(one), one.split] for one in identities()],
        "backgrounds": scenes.BACKGROUNDS,
        "sizes": render.SIZE_PX,
        "positions": scenes.POSITIONS,
        "resolution": render.RESOLUTION,
        "seed": seed,
        # The rules of drawing are code: pictures and captions of a sample stand for them.
        "captions": [caption(split, index, seed) for split in SPLITS for index in range(64)],
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    counts = {split: len(identities(split)) for split in SPLITS}
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "seed": seed, "identities": counts}
