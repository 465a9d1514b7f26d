"""Pairs of noise and what the teacher draws of it: what `launch/pairs.py` does."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.data.latent_sets import FORMAT
from sbv2_jax.data.pairs import Pairs
from sbv2_jax.data.prompts import describe_cut, notes_of, open_prompts, shuffled
from sbv2_jax.devices import processes
from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.schedule import is_guided, make_schedule
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.generate.inference import GeneratorParams, draw_latents
from sbv2_jax.generate.pipeline import check_numbers
from sbv2_jax.models.conditions import join_towers
from sbv2_jax.run.build import DTYPES
from sbv2_jax.run.components import Parts, latent_side, read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.generators import teacher_of
from sbv2_jax.run.latent_sets import OnEveryDevice, make_set, require_same
from sbv2_jax.run.sources import Files, sources_of
from sbv2_jax.tree import Params

# What decides the latents of a teacher, by the names of a run's sources; the autoencoder does not.
_TEACHER = ("teacher", "teacher_schedule", "text_encoder", "text_encoder_2", "tokenizer", "zero_null")


class Drawing(NamedTuple):
    """How the teacher draws; `precision` is that of its arithmetic."""

    steps: int
    guidance: float
    sampler: str
    seed: int
    precision: str


def make_pairs(
    model: str,
    prompts: str,
    out: str | Path,
    drawing: Drawing,
    *,
    column: str = "",
    resolution: int = 0,
    count: int,
    dtype: str,
    shard_size: int,
    batch_size: int,
) -> None:
    """Draws `count` pairs and writes them to a directory, in shards, with a manifest of what they were drawn from.

    Pair i has the i-th prompt of a permutation by the seed (a new one where the prompts are used up) and the noise
    `initial_noise(seed, [i], latent_shape)`. Finished shards are kept, so that an interrupted run goes on; several
    processes share out the shards. `batch_size` pairs are drawn by a device at a time, always the same ones, so
    that the files do not depend on how many devices and processes there are.
    Raises InputError for bad input, and for a directory of other settings, before anything is written.
    """
    check_numbers(seed=drawing.seed, steps=drawing.steps, guidance=drawing.guidance)
    config, out = default_config(), Path(out)
    config.update(teacher=model, resolution=resolution, terms=())
    with processes.ending_together():
        with processes.together():
            parts, source = read_parts(config), open_prompts(prompts, column)
            side = latent_side(config, parts)
            _require_steps(parts, drawing)
            found = sources_of(parts, Files(out))
            settings = {
                "format": FORMAT,
                "count": count,
                **drawing._asdict(),
                "guidance": float(drawing.guidance) if is_guided(drawing.guidance) else 1.0,
                "dtype": dtype,
                "latent_shape": [side, side, parts.teacher.config.in_channels],
                "shard_size": shard_size,
                "prompts": source.fingerprint(),
                "made_from": {name: found[name]["sha256"] for name in _TEACHER if name in found},
            }
            require_same(out, Pairs.THINGS, settings)
        processes.require_same("what the pairs are drawn from", json.dumps(settings))
        with processes.together():
            if jax.process_index() == 0:
                for line in (*notes_of(source), *filter(None, [describe_cut(source, parts.opened[1])])):
                    logging.warning(line)
        make_set(
            *(out, Pairs.THING, Pairs.THINGS, settings),
            lambda: _Teacher(settings, parts, shuffled(source, drawing.seed), batch_size),
        )


def _require_steps(parts: Parts, drawing: Drawing) -> None:
    """Raises InputError for steps that the teacher's schedule cannot give to the sampler."""
    schedule = make_schedule(parts.teacher_schedule)
    if drawing.steps > 1:
        sample = functools.partial(samplers.sample, lambda x, t: x, schedule)
        jax.eval_shape(
            functools.partial(sample, steps=drawing.steps, sampler=drawing.sampler),
            jax.ShapeDtypeStruct((1, 1), "float32"),
        )


class _Teacher:
    """Draws the latents of pairs."""

    def __init__(self, settings: Mapping[str, Any], parts: Parts, prompts: Sequence[str], batch_size: int):
        self._prompts, self._tokenizer = prompts, parts.opened[1]
        dtype, generator = DTYPES[settings["precision"]], teacher_of(parts)
        how = {name: settings[name] for name in ("steps", "guidance", "sampler")}

        def latents(given: tuple[GeneratorParams, jax.Array], rows: Mapping[str, jax.Array]) -> jax.Array:
            params, null_ids = given
            noise = initial_noise(settings["seed"], rows["numbers"], tuple(settings["latent_shape"]))
            drawn = draw_latents(generator, params, rows["ids"], null_ids, noise, **how)
            return drawn.astype(settings["dtype"])

        self._latents = OnEveryDevice(latents, min(batch_size, settings["shard_size"], settings["count"]))
        self.at_a_time = self._latents.at_a_time

        def load(directory: Path) -> Params:
            return self._latents.hold(load_component(directory, dtype=dtype).params)

        towers = {name: load(part.files) for name, part in parts.text_encoders.items()}
        params = GeneratorParams(unet=load(parts.teacher.files), text_encoder=join_towers(towers), vae={})
        self._given = params, self._tokenizer.encode([""])[0]

    def make(self, numbers: range) -> tuple[np.ndarray, list[str]]:
        """Returns the latents of pairs, and their prompts."""
        prompts = [self._prompts[number] for number in numbers]
        rows = {"ids": self._tokenizer.encode(prompts), "numbers": np.asarray(numbers, np.uint32)}
        return self._latents(self._given, rows), prompts
