"""The pictures and captions that every stage reads: drawn once, kept in files, given as arrays."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import Tokenizer
from sbv2_jax.openmoji import scenes
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.draws import uniforms
from sbv2_jax.openmoji.render import RESOLUTION


@dataclasses.dataclass(frozen=True)
class World:
    """The training pictures, uint8 [N, 64, 64, 3], memory-mapped, and the facts of each.

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
    """Returns the training world, drawing its pictures into `directory` the first time.

    Raises InputError where the files there are of another world, or without the [openmoji] extra.
    """
    directory = Path(directory)
    scene_list = [scenes.scene("train", index, seed) for index in range(pictures)]
    captions = [
        [openmoji.caption("train", index, seed)]
        + [scenes.caption(scene, uniforms(seed, "caption", "train", index, n)) for n in range(1, phrasings)]
        for index, scene in enumerate(scene_list)
    ]
    numbers = {name: n for n, name in enumerate(sorted({scene.identity for scene in scene_list}))}
    identities = np.array([numbers[scene.identity] for scene in scene_list], np.int32)
    facts = {"world": openmoji.manifest(seed)["sha256"], "pictures": pictures}
    array = _drawn(directory, facts, seed)
    return World(array, captions, identities, f"{facts['world']}/{pictures}/{phrasings}")


def _drawn(directory: Path, facts: dict, seed: int) -> np.ndarray:
    path, about = directory / "pictures.npy", directory / "world.json"
    if about.exists():
        found = json.loads(about.read_text(encoding="utf-8"))
        if found != facts:
            raise InputError(f"{directory} holds another world ({found}): remove it, or use another workdir")
        return np.load(path, mmap_mode="r")
    directory.mkdir(parents=True, exist_ok=True)
    shape = (facts["pictures"], RESOLUTION, RESOLUTION, 3)
    scratch = path.with_suffix(".partial.npy")
    array = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.uint8, shape=shape)
    for index in tqdm(range(shape[0]), desc="drawing", unit="picture", mininterval=5):
        array[index] = openmoji.example("train", index, seed).image
    array.flush()
    os.replace(scratch, path)
    about.write_text(json.dumps(facts), encoding="utf-8")
    return np.load(path, mmap_mode="r")


def validation_pictures(count: int, seed: int) -> np.ndarray:
    """Returns pictures of identities that training never shows, uint8 [count, 64, 64, 3]."""
    return np.stack([openmoji.example("validation", index, seed).image for index in range(count)])
