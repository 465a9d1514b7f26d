"""Where the pictures of a report come from: a pipeline with its sampler, or a folder."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbv2_jax.diffusion.schedule import is_guided
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.pictures import Folder, Pictures
from sbv2_jax.generate.pipeline import Pipeline


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Pictures of prompts: `draw(rows, prompts)` gives one for each, uint8 [H, W, 3].

    A picture depends on its prompt, its row and the settings alone, which are what a report says of it; the seed is
    among them. `forwards` is how often a picture takes the UNet; None where nothing is drawn.
    """

    name: str
    settings: Mapping[str, Any]
    fingerprint: str
    draw: Callable[[Sequence[int], Sequence[str]], Sequence[np.ndarray]]
    forwards: int | None = None


def of_pipeline(
    model: str,
    pipeline: Pipeline,
    fingerprint: str,
    *,
    steps: int | None,
    guidance: float,
    sampler: str | None,
    seed: int,
    batch_size: int,
) -> Source:
    """Returns the source of a pipeline's pictures; `fingerprint` is that of its weights (`weights_of`).

    Without `steps` and `sampler` a student draws in its own.
    """
    steps, sampler = pipeline.settled(steps, sampler)
    guidance = float(guidance) if is_guided(guidance) else 1.0

    def draw(rows: Sequence[int], prompts: Sequence[str]) -> list[np.ndarray]:
        pictures: list[np.ndarray] = []
        for start in range(0, len(rows), batch_size):
            # The last batch is filled up, so that one compiled program draws all of them.
            picked = [min(start + place, len(rows) - 1) for place in range(batch_size)]
            pictures += list(
                pipeline.draw(
                    [prompts[one] for one in picked],
                    seed=seed,
                    indices=[rows[one] for one in picked],
                    steps=steps,
                    guidance=guidance,
                    sampler=sampler,
                )
            )
        return pictures[: len(rows)]

    settings = {"model": model, "steps": steps, "guidance": guidance, "seed": seed}
    if steps > 1:
        settings["sampler"] = sampler
    shown = f"{model}, {steps} step{'s' if steps > 1 else ''}"
    shown += f", guidance {guidance:g}" if is_guided(guidance) else ""
    forwards = steps * (2 if is_guided(guidance) else 1)
    return Source(name=shown, settings=settings, fingerprint=fingerprint, draw=draw, forwards=forwards)


def of_folder(directory: str | Path, count: int) -> Source:
    """Returns the source of a folder, whose pictures are of the prompts in the order of their names.

    Raises InputError where there are other than `count`: they would be compared with the captions of others.
    """
    folder = Folder(directory)
    if len(folder) != count:
        raise InputError(f"{directory} holds {len(folder)} pictures, and the protocol has {count} prompts")
    return of_pictures(str(directory), folder)


def of_pictures(name: str, pictures: Pictures) -> Source:
    """Returns the source of pictures that are there."""

    def draw(rows: Sequence[int], prompts: Sequence[str]) -> list[np.ndarray]:
        return [pictures[row] for row in rows]

    return Source(name=name, settings={"pictures": name}, fingerprint=pictures.fingerprint(), draw=draw)


def weights_of(pipeline: Pipeline) -> str:
    """Returns one SHA-256 over all weights of a pipeline and what it makes of them."""
    # The structure holds what is static: configurations' reprs stand for the networks.
    drawn_by = (pipeline.params, pipeline.generator.schedule)
    static = (pipeline.parts.configs, pipeline.latent_shape, jax.tree.structure(drawn_by))
    total = hashlib.sha256(repr(static).encode())
    for leaf in jax.tree.leaves(drawn_by):
        total.update(f"{leaf.dtype}{leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()
