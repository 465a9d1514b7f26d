"""From what the user names to sources of pictures: what `launch/evaluate.py` does."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.convert.merge import merged
from sbv2_jax.convert.model import Model
from sbv2_jax.diffusion.samplers import SAMPLERS
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate import report, sources
from sbv2_jax.evaluate.measure import evaluate
from sbv2_jax.evaluate.pictures import Pictures
from sbv2_jax.evaluate.protocol import Protocol
from sbv2_jax.evaluate.sources import Source
from sbv2_jax.fields import nearest
from sbv2_jax.generate.pipeline import Pipeline, check_numbers
from sbv2_jax.run.directory import is_run
from sbv2_jax.run.drawn import drawn_of, pair_of, pipeline_of
from sbv2_jax.run.trained import read_run

_SETTINGS = ("steps", "guidance", "sampler", "step", "which")
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")
_MOST = 200  # values of one range


def run(
    protocol: Protocol,
    *,
    models: Sequence[str],
    merge: str | None,
    folders: Sequence[str],
    real: Pictures | None,
    steps: str | None,
    guidance: str,
    weight: str,
    sampler: str | None,
    seeds: Sequence[int],
    batch_size: int,
    out: Path,
    cache: Path,
    command: str,
) -> None:
    """Measures models and folders of pictures by a protocol, prints the table, and writes the report to `out`.

    Models are drawn with every setting of a sweep and every seed, students in their own steps without `steps`;
    the folder 'real' stands for `real`, real pictures of the protocol's own prompts. Killed and called again, it goes
    on, and ends in the same report.
    Raises InputError for what is wrong with the input, before a picture is drawn.
    """
    numbers = {"steps": values(steps, int) if steps else (None,), "guidance": values(guidance, float)}
    _check_numbers(numbers)
    asked = [_spec(model, numbers, sampler) for model in models]
    weights = values(weight, float) if merge else ()
    if not (asked or merge or folders):
        raise InputError("give --model, --merge or --pictures")
    # What is wrong with the last one is said before the first is drawn.
    for spec in asked:
        _check(spec)
    pair = pair_of(merge) if merge else None
    found = [_of_folder(folder, protocol, real) for folder in folders]
    everything = itertools.chain(
        *(_of_model(spec, seeds, batch_size) for spec in asked),
        _of_merges(pair, weights, {**numbers, "sampler": sampler}, seeds, batch_size) if pair else (),
        found,
    )
    evaluation = evaluate(protocol, everything, out, cache)
    report.write(evaluation, command, out)
    print(report.table(evaluation))
    for row in evaluation.rows:
        if row.rate:
            print(f"{row.name}: {row.rate:.3g} pictures/s")
    print(f"{out / 'report.html'}")


def values(text: str, kind: type) -> tuple[Any, ...]:
    """Returns the numbers of "1,4,25", or of "FIRST:LAST:BETWEEN", both ends included.

    Raises InputError for anything else.
    """
    found: list[Any] = []
    for part in filter(None, text.split(",")):
        try:
            if match := _RANGE.fullmatch(part):
                first, last, between = map(float, match.groups())
                count = int(np.floor((last - first) / between + 1e-9)) + 1
                if not 0 < count <= _MOST or between <= 0:
                    raise ValueError
                found += [kind(round(first + between * index, 10)) for index in range(count)]
            else:
                found.append(kind(part))
        except (ValueError, OverflowError, ZeroDivisionError):
            raise InputError(f"{part!r}: a number or FIRST:LAST:BETWEEN is expected") from None
    if not found:
        raise InputError(f"{text!r}: numbers are expected")
    return tuple(dict.fromkeys(found))


def _of_folder(folder: str, protocol: Protocol, real: Pictures | None) -> Source:
    if folder != "real":
        return sources.of_folder(folder, len(protocol.prompts))
    if real is None:
        raise InputError(f"--pictures=real: {protocol.name} has no real pictures of its prompts")
    return sources.of_pictures("real", real)


def _spec(text: str, numbers: Mapping[str, tuple], sampler: str | None) -> dict[str, Any]:
    """Reads PATH[,steps=N][,guidance=W][,sampler=NAME][,step=N][,which=ema|student]."""
    name, *given = text.split(",")
    spec = {"model": name, **numbers, "sampler": sampler, "step": None, "which": None}
    for one in given:
        value: Any
        key, equals, value = one.partition("=")
        if key not in _SETTINGS or not equals:
            raise InputError(
                f"--model={text}: {one!r} is none of {', '.join(_SETTINGS)}{nearest(key, _SETTINGS, '')}"
            )
        if key in numbers:
            value = values(value, int if key == "steps" else float)
        elif key == "step":
            value = values(value, int)[0]
        spec[key] = value
    if spec["sampler"] not in (None, *SAMPLERS):
        raise InputError(f"--model={text}: the sampler is 'ddim', 'dpm' or 'lcm'")
    if spec["which"] not in (None, "student", "ema"):
        raise InputError(f"--model={text}: which is 'student' or 'ema'")
    _check_numbers(spec)
    return spec


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    for steps, guidance in itertools.product(numbers["steps"], numbers["guidance"]):
        check_numbers(seed=0, steps=steps, guidance=guidance)


def _check(spec: Mapping[str, Any]) -> None:
    """Raises InputError where a model or its checkpoint is not there."""
    if is_run(spec["model"]):
        read_run(spec["model"], spec["step"], "step")
        return
    if spec["step"] is not None or spec["which"] is not None:
        raise InputError(f"--model={spec['model']}: step and which are of a run, and it is none")
    load_pipeline(spec["model"])


def _of_model(spec: Mapping[str, Any], seeds: Sequence[int], batch_size: int) -> Iterator[Source]:
    drawn = drawn_of(spec["model"], step=spec["step"], which=spec["which"])
    yield from _swept(drawn.name, drawn.load(), spec, seeds, batch_size)


def _of_merges(
    models: Sequence[Model],
    weights: Sequence[float],
    spec: Mapping[str, Any],
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[Source]:
    first, other = models
    for weight in weights:
        name = f"{weight:g} of {first.name} with {1 - weight:g} of {other.name}"
        unet = Component(first.unet.config, merged(models, (weight, 1.0 - weight)))
        pipeline = pipeline_of(Model(name, unet, first.pipeline, first.scheduler))
        for source in _swept(name, pipeline, spec, seeds, batch_size):
            settings = {**source.settings, "model": f"{first.name} and {other.name}", "weight": weight}
            yield dataclasses.replace(source, settings=settings)


def _swept(
    name: str, pipeline: Pipeline, spec: Mapping[str, Any], seeds: Sequence[int], batch_size: int
) -> Iterator[Source]:
    fingerprint = sources.weights_of(pipeline)
    for steps, guidance, seed in itertools.product(spec["steps"], spec["guidance"], seeds):
        yield sources.of_pipeline(
            name,
            pipeline,
            fingerprint,
            steps=steps,
            guidance=guidance,
            sampler=spec["sampler"],
            seed=seed,
            batch_size=batch_size,
        )
