"""What the live page shows: pictures of models that are opened once, each with the time that it took."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sbv2_jax.errors import InputError
from sbv2_jax.generate.pictures import tile
from sbv2_jax.generate.pipeline import Pipeline
from sbv2_jax.run.drawn import drawn_of, pair_of, pipeline_of
from sbv2_jax.tree import Params

MOST_PICTURES = 9
_SHOWN_SIDE = 384  # pixels at least that a sheet of pictures has


class Shown(NamedTuple):
    """A sheet of pictures, uint8 [H, W, 3], how long drawing it took, in seconds, and whether it had to be compiled."""

    sheet: np.ndarray
    seconds: float
    compiled: bool


class Studio:
    """The models of a page, by name; each is loaded when it is first asked for, and kept.

    Args:
      models: directories, hub ids, "bundled" or runs (which stand for their newest student).
      merge: "A,B", two models of one shape whose weighted sum can be drawn, or "" for none.

    Raises InputError for a model that is not there, and for two that cannot be merged.
    """

    def __init__(self, models: Sequence[str], merge: str = ""):
        self.names = list(dict.fromkeys(models))
        self._opened: dict[str, Pipeline] = {}
        self._loads = {name: drawn_of(name).load for name in self.names}
        self._lock = threading.Lock()  # one picture at a time: the cores are shared
        self._compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)
        self._pair: tuple[Pipeline, Params, Params] | None = None
        self.merges: list[str] = []
        if merge:
            first, other = pair_of(merge)
            self.merges = [first.name, other.name]
            pipeline = pipeline_of(first)
            # What is around the first one is around all merges.
            second = pipeline_of(dataclasses.replace(first, name=other.name, unet=other.unet))
            self._pair = pipeline, pipeline.params.unet, second.params.unet

    def pictures(
        self,
        name: str,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> Shown:
        """Draws `count` pictures of a prompt, at most `MOST_PICTURES`; raises InputError as `Pipeline.draw` does."""
        pipeline = self._open(name)
        return self._timed(
            lambda: pipeline.draw(
                [prompt] * min(count, MOST_PICTURES),
                seed=seed,
                negative_prompt=negative_prompt,
                steps=steps,
                guidance=guidance,
            )
        )

    def between(
        self, name: str, prompts: tuple[str, str], seeds: tuple[int, int], share: float, noise_share: float
    ) -> Shown:
        """Draws the picture between two prompts and two noises; raises InputError as `Pipeline.between`."""
        pipeline = self._open(name)
        return self._timed(
            lambda: pipeline.between(prompts, [share], seeds=seeds, noise_shares=[noise_share])
        )

    def merged(self, prompt: str, weight: float, *, seed: int = 0) -> Shown:
        """Draws a picture with `weight` of the first model of the merge and the rest of the other."""
        if self._pair is None:
            raise InputError("no two models were given to merge")
        pipeline, first, other = self._pair
        unet = _sum(first, other, np.float32(weight))
        return self._timed(lambda: pipeline.draw([prompt], seed=seed, unet=unet))

    def _open(self, name: str) -> Pipeline:
        if name not in self._loads:
            raise InputError(f"{name!r} is none of the models here: {', '.join(self.names)}")
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._loads[name]()
            return self._opened[name]

    def _timed(self, draw: Callable[[], np.ndarray]) -> Shown:
        with self._lock:
            begin, before = time.perf_counter(), self._compiled
            pictures = draw()
            seconds, compiled = time.perf_counter() - begin, self._compiled > before
        sheet = tile(pictures)
        scale = max(1, -(-_SHOWN_SIDE // sheet.shape[1]))
        return Shown(sheet.repeat(scale, 0).repeat(scale, 1), seconds, compiled)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        # Also where the program then comes from the cache, which takes its time too.
        self._compiled += event == "/jax/core/compile/backend_compile_duration"


@jax.jit
def _sum(first: Params, other: Params, weight: jax.Array) -> Params:
    return jax.tree.map(lambda one, two: weight * one + (1 - weight) * two, first, other)
