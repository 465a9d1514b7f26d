"""The pictures and captions that every stage reads: the TFDS data set of the world, given as arrays."""

import dataclasses
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import Tokenizer
from sbv2_jax.openmoji import scenes
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.draws import uniforms
from sbv2_jax.openmoji.render import RESOLUTION
from sbv2_jax.openmoji.tfds_builder import AnotherWorld, OpenMojiConfig, sources


@dataclasses.dataclass(frozen=True)
class World:
    """The training pictures, uint8 [N, 64, 64, 3], and the facts of each.

    `captions[i]` are the phrasings of picture i; `identities[i]` is the number of what it shows.
    """

    pictures: np.ndarray
    captions: list[list[str]]
    identities: np.ndarray
    fingerprint: str

    def twins(self) -> dict[str, np.ndarray]:
        """Returns the pictures in the order of their identities, and where each identity starts and ends.

        `order` int32 [N]; `start` and `count` int32 [identities that occur].
        """
        order = np.argsort(self.identities, kind="stable").astype(np.int32)
        _, start, count = np.unique(self.identities[order], return_index=True, return_counts=True)
        return {"order": order, "start": start.astype(np.int32), "count": count.astype(np.int32)}

    def token_ids(self, tokenizer: Tokenizer) -> np.ndarray:
        """Returns the captions as token ids, int32 [N, phrasings, max_length]."""
        flat = tokenizer.encode([text for texts in self.captions for text in texts])
        return flat.reshape(len(self.captions), -1, tokenizer.max_length)


def open_world(directory: str | Path, *, pictures: int, phrasings: int, seed: int) -> World:
    """Returns the training world, drawing its pictures into the TFDS data set under `directory` the first time.

    Raises InputError where the files there are of another world, or without the [openmoji] extra.
    """
    config = OpenMojiConfig(name="pretraining", train=pictures, validation=0, test=0, seed=seed)
    try:
        source = sources(str(directory), config)["train"]
    except AnotherWorld as error:
        raise InputError(
            f"{directory} holds another world: remove it, or use another workdir ({error})"
        ) from error
    array = np.empty((pictures, RESOLUTION, RESOLUTION, 3), np.uint8)
    captions, names = [], []
    for index, one in enumerate(tqdm(source, desc="reading", unit="picture", mininterval=5)):
        array[index] = one["image"]
        names.append(one["identity"].decode())
        others = [_phrasing(index, number, seed) for number in range(1, phrasings)]
        captions.append([one["caption"].decode(), *others])
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return World(
        pictures=array,
        captions=captions,
        identities=np.array([numbers[name] for name in names], np.int32),
        fingerprint=f"{openmoji.manifest(seed)['sha256']}/{pictures}/{phrasings}",
    )


def _phrasing(index: int, number: int, seed: int) -> str:
    """Returns a further caption of picture `index`, in other words."""
    scene = scenes.scene("train", index, seed)
    return scenes.caption(scene, uniforms(seed, "caption", "train", index, number))


def validation_pictures(count: int, seed: int) -> np.ndarray:
    """Returns pictures of identities that training never shows, uint8 [count, 64, 64, 3]."""
    return np.stack([openmoji.example("validation", index, seed).image for index in range(count)])
