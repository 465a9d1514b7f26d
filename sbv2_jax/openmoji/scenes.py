"""Scenes of the OpenMoji world (what a picture shows) and the captions that say it."""

import dataclasses
import hashlib
from collections.abc import Iterator

from sbv2_jax.openmoji.draws import pick, uniforms
from sbv2_jax.openmoji.identities import Identity, by_name, identities

BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "red": (225, 50, 60),
    "orange": (255, 145, 30),
    "yellow": (255, 225, 70),
    "green": (60, 170, 85),
    "cyan": (90, 220, 225),
    "blue": (50, 100, 220),
    "purple": (140, 70, 190),
    "pink": (255, 150, 195),
}
SIZES = ("small", "large")
POSITIONS = ("center", "top left", "top right", "bottom left", "bottom right")
# Of 16 classes of combinations two never occur in training: one is for validation, one for test.
_CLASSES = 16
_WITHHELD = {"validation": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class Scene:
    """The facts of one picture: the name of the identity, the background colour, the size, the position."""

    identity: str
    background: str
    size: str
    position: str


def combination(scene: Scene) -> str:
    """Returns "train", "validation" or "test": where this combination of the four facts may occur."""
    key = "/".join(dataclasses.astuple(scene))
    kind = int(hashlib.sha256(key.encode()).hexdigest(), 16) % _CLASSES
    return next((split for split, withheld in _WITHHELD.items() if kind == withheld), "train")


def draw_scene(pool: tuple[Identity, ...], draws: Iterator[float], of: str | None = None) -> Scene:
    """Returns a random scene of an identity in `pool`; with `of`, one whose `combination` is that."""
    while True:
        one = pick(draws, pool)
        background = pick(draws, [name for name in BACKGROUNDS if name not in one.avoid])
        size = pick(draws, SIZES)
        position = pick(draws, POSITIONS) if size != "large" else "center"
        scene = Scene(one.name, background, size, position)
        if of is None or combination(scene) == of:
            return scene


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Returns the facts of picture `index` of a split; training never holds a withheld combination."""
    of = "train" if split == "train" else None
    return draw_scene(identities(split), uniforms(seed, "scene", split, index), of)


def caption(scene: Scene, draws: Iterator[float], full: bool = False) -> str:
    """Returns a sentence that says the scene, in one of several phrasings.

    The size and the position are each left out of three captions in ten, and of none with `full` (but for
    the position of a large picture, which is always the center).
    """
    name, article = scene.identity, by_name()[scene.identity].article
    large = scene.size == "large"
    size = scene.size if full or next(draws) < 0.7 else ""
    position = scene.position if full or next(draws) < 0.7 else ""
    if large and next(draws) < 0.7:
        position = ""
    bare = f"{size} {name}".strip()
    noun = _with_article(bare, article if not size else article and "a")
    place = f"in the {position}" if position else ""
    background = f"{scene.background} background"
    a_background = _with_article(background, "an" if scene.background == "orange" else "a")
    phrasing = pick(draws, range(5))
    if phrasing == 0:
        return _join(" ", noun, place, f"on {a_background}")
    if phrasing == 1:
        return _join(", ", bare, position, background)
    if phrasing == 2:
        return _join(" ", f"{a_background} with {noun}", place)
    if phrasing == 3:
        return _join(", ", f"{_with_article(name, article)} on {a_background}", size, position)
    return _join(", ", f"{noun} on {scene.background}", position)


def _with_article(noun: str, article: str) -> str:
    return f"{article} {noun}" if article else noun


def _join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)
