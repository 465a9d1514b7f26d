"""Pairs of noise and what the teacher draws of it: what `launch/pairs.py` does."""

import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.formats.files import read_json, replaced_file, write_json
from sbv2_jax.data import pairs as files
from sbv2_jax.data.pairs import MANIFEST, pack, sha256_of, shard_names
from sbv2_jax.data.prompts import describe_cut, notes_of, open_prompts, shuffled
from sbv2_jax.devices import processes
from sbv2_jax.devices.sharding import batch_sharding, make_mesh
from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.schedule import is_guided, make_schedule
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.generate.inference import GeneratorParams, draw_latents
from sbv2_jax.generate.pipeline import check_numbers
from sbv2_jax.models.conditions import join_towers
from sbv2_jax.run.arrays import place
from sbv2_jax.run.build import DTYPES
from sbv2_jax.run.components import Parts, latent_side, read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.generators import teacher_of
from sbv2_jax.run.sources import Files, sources_of
from sbv2_jax.tree import Params

# What decides the latents of a teacher, by the names of a run's sources; the autoencoder does not.
_TEACHER = ("teacher", "teacher_schedule", "text_encoder", "text_encoder_2", "tokenizer", "zero_null")
_POLL_SECONDS = 0.25


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
                "format": files.FORMAT,
                "count": count,
                **drawing._asdict(),
                "guidance": float(drawing.guidance) if is_guided(drawing.guidance) else 1.0,
                "dtype": dtype,
                "latent_shape": [side, side, parts.teacher.config.in_channels],
                "shard_size": shard_size,
                "prompts": source.fingerprint(),
                "made_from": {name: found[name]["sha256"] for name in _TEACHER if name in found},
            }
            _require_same(out, settings)
        processes.require_same("what the pairs are drawn from", json.dumps(settings))
        with processes.together():
            if jax.process_index() == 0:
                for line in (*notes_of(source), *filter(None, [describe_cut(source, parts.opened[1])])):
                    logging.warning(line)
                _begin(out, settings)
        processes.require_shared(out)
        # One that fails here ends all, and one that is ready waits without a collective, which has a time limit.
        _draw_shards(out, settings, parts, shuffled(source, drawing.seed), batch_size)
        names = shard_names(count, shard_size)
        while not all((out / name).exists() for name in names):
            time.sleep(_POLL_SECONDS)
        with processes.together():
            if jax.process_index() == 0:
                shards = {name: sha256_of(out / name) for name in names}
                with replaced_file(out / MANIFEST) as partial:
                    write_json(partial, settings | {"shards": shards})
                print(f"{count} pair(s) in {len(names)} shard(s): {out}")


def _require_steps(parts: Parts, drawing: Drawing) -> None:
    """Raises InputError for steps that the teacher's schedule cannot give to the sampler."""
    schedule = make_schedule(parts.teacher_schedule)
    if drawing.steps > 1:
        sample = functools.partial(samplers.sample, lambda x, t: x, schedule)
        jax.eval_shape(
            functools.partial(sample, steps=drawing.steps, sampler=drawing.sampler),
            jax.ShapeDtypeStruct((1, 1), "float32"),
        )


def _require_same(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError, naming what differs, where a directory holds pairs of other settings, or anything else."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file, not a directory")
    if not (out / MANIFEST).exists():
        if out.exists() and any(name for name in os.listdir(out) if not name.startswith(".")):
            raise InputError(
                f"--out={out} is not empty, and has no {MANIFEST} of pairs: give another directory"
            )
        return
    there = read_json(out / MANIFEST)
    differ = []
    for name, here in settings.items():
        was = there.get(name)
        if was == here:
            continue
        if name == "made_from" and isinstance(was, dict):
            parts = [part for part in sorted(was.keys() | here.keys()) if was.get(part) != here.get(part)]
            differ.append(f"the model differs in {', '.join(parts)}")
        elif name == "prompts":
            differ.append("the prompts differ")
        else:
            differ.append(f"{name} is {was!r} there, {here!r} here")
    if differ:
        raise InputError(f"--out={out} holds pairs of other settings: {'; '.join(differ)}")


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the directory and its manifest, and removes what a killed run left unfinished."""
    for left in out.glob(".*.partial-*"):
        left.unlink()
    if not (out / MANIFEST).exists():
        with replaced_file(out / MANIFEST) as partial:
            write_json(partial, dict(settings))


def _draw_shards(
    out: Path, settings: Mapping[str, Any], parts: Parts, prompts: Sequence[str], batch_size: int
) -> None:
    """Draws and writes those of this process's shards that are not there."""
    count, size = settings["count"], settings["shard_size"]
    shards = list(enumerate(shard_names(count, size)))[jax.process_index() :: jax.process_count()]
    todo = {
        name: range(number * size, min(count, (number + 1) * size))
        for number, name in shards
        if not (out / name).exists()
    }
    if not todo:
        return
    painter = _Teacher(settings, parts, min(batch_size, size, count))
    total = sum(map(len, todo.values()))
    with tqdm(total=total, unit="pair", disable=jax.process_index() > 0) as bar:
        for name, numbers in todo.items():
            records: list[bytes] = []
            for some in painter.groups(numbers):
                texts = [prompts[number] for number in some]
                latents = painter.draw(some, texts)
                records += map(pack, some, latents, texts)
                bar.update(len(some))
            _write_shard(out / name, records)


def _write_shard(path: Path, records: Sequence[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with replaced_file(path) as partial:
        try:
            # Each record can be read by itself; latents hardly compress.
            writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # a bare C++ error, of a full disk too
            raise InputError(f"cannot write {path}: {error}") from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())


class _Teacher:
    """Draws latents over all devices of this process, `batch_size` on each at a time."""

    def __init__(self, settings: Mapping[str, Any], parts: Parts, batch_size: int):
        devices = jax.local_devices()
        self._mesh, self._batch_size = make_mesh(1, len(devices), 1, devices), batch_size
        self._settings, self._tokenizer = settings, parts.opened[1]
        self._null_ids = self._tokenizer.encode([""])[0]
        dtype, everywhere = DTYPES[settings["precision"]], NamedSharding(self._mesh, PartitionSpec())

        def load(directory: Path) -> Params:
            weights = load_component(directory, dtype=dtype).params
            return place(weights, dict.fromkeys(weights, everywhere))

        towers = {name: load(part.files) for name, part in parts.text_encoders.items()}
        self._params = GeneratorParams(
            unet=load(parts.teacher.files), text_encoder=join_towers(towers), vae={}
        )
        self._sharding, generator = batch_sharding(self._mesh), teacher_of(parts)
        how = {name: settings[name] for name in ("steps", "guidance", "sampler")}

        def latents(
            params: GeneratorParams, ids: jax.Array, null_ids: jax.Array, numbers: jax.Array
        ) -> jax.Array:
            noise = initial_noise(settings["seed"], numbers, tuple(settings["latent_shape"]))
            return draw_latents(generator, params, ids, null_ids, noise, **how).astype(settings["dtype"])

        # Each device runs the program of one alone: split by the compiler, its numbers would be rounded otherwise.
        whole, rows = PartitionSpec(), self._sharding.spec
        self._latents = jax.jit(
            jax.shard_map(
                latents,
                mesh=self._mesh,
                in_specs=(whole, rows, whole, rows),
                out_specs=rows,
                check_vma=False,
            )
        )

    def groups(self, numbers: range) -> list[range]:
        """Returns the numbers of a shard as they are drawn: a batch for each device at a time."""
        at_a_time = self._batch_size * self._mesh.size
        return [numbers[start : start + at_a_time] for start in range(0, len(numbers), at_a_time)]

    def draw(self, numbers: range, prompts: Sequence[str]) -> np.ndarray:
        """Returns the latents of pairs, [len(numbers), h, w, C]; raises InputError for one that is not finite."""
        # The last ones are filled up, so that one compiled program draws all.
        filled = np.minimum(np.arange(self._batch_size * self._mesh.size), len(numbers) - 1)
        rows = {
            "ids": self._tokenizer.encode(prompts)[filled],
            "numbers": np.asarray(numbers, np.uint32)[filled],
        }
        placed = place(rows, dict.fromkeys(rows, self._sharding))
        drawn = np.asarray(self._latents(self._params, placed["ids"], self._null_ids, placed["numbers"]))
        drawn = drawn[: len(numbers)]
        bad = [number for number, latent in zip(numbers, drawn, strict=True) if not np.isfinite(latent).all()]
        if bad:
            raise InputError(
                f"the latent of pair {bad[0]} is not finite in {self._settings['dtype']}; its prompt is "
                f"{prompts[bad[0] - numbers[0]]!r}"
            )
        return drawn
