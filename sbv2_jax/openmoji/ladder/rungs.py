"""The rungs of the ladder, all in one table: what each is, how it is trained, and what it starts from."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sbv2_jax import fields
from sbv2_jax.distill.terms.term import rows_of
from sbv2_jax.errors import InputError
from sbv2_jax.run.config import may_change, validate
from sbv2_jax.run.config_fields import FIELDS
from sbv2_jax.run.forwards import forwards_of_an_image

# It is climbed from a checkout, which has the commands and the configurations.
ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "openmoji.py"
SEEDS = (0, 1, 2)
TEACHER = "teacher"
# What the full and the LoRA training that are merged start from: `TEACHER`, or the rung whose start has proved better.
START = TEACHER
LAMBDA = 0.5  # the paper's weight of the full training in a merge
# Where something lies does not say what it is: starts and pairs are told by the names of their rungs.
_PLACES = ("seed", "student.init", "pairs.path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """A rung: its name, what it is, how `launch/train.py` trains it, or which two trainings it merges.

    `paper` is what stands in the paper's tables for it, FID on COCO. `word` is the argument of the configuration,
    `changes` are fields beside it, `start` is a rung whose export it starts from, or `TEACHER`; `pairs` says that it
    reads pairs of the teacher's. `merge` names the full training and the LoRA of a merge, and `curve` asks for the
    curve over its weight.
    """

    name: str
    what: str
    paper: str = ""
    word: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: str = TEACHER
    pairs: bool = False
    merge: tuple[str, str] | None = None
    curve: bool = False
    seeds: tuple[int, ...] = SEEDS


_REGULARISED = {"terms": ("vsd", "clip", "regression")}
_NO_CLIP = {"clip.model": "", "clip.weight": 0.0}
_CONSTANT = {"clip.schedule": "constant"}

RUNGS = (
    Rung(
        name="regression",
        what="baseline: regression on the teacher's pairs alone, at the cost of `full` in forwards",
        word="regression",
        # With as many forwards of the teacher, all in its pairs, three times the steps of `full` cost the same.
        changes={"steps": 1200},
        pairs=True,
    ),
    Rung(
        name="v1",
        what="SwiftBrush v1: from the teacher's weights, VSD as published: weight s_t², the score model a LoRA of "
        "attention's q and v, both guided alike",
        paper="15.46",
        word="v1",
        changes={
            "vsd.score_guidance": 1.5,
            "score.targets": FIELDS["score.targets"].default,
        },
    ),
    Rung(name="full", what="full training, this world's recipe", paper="14.59", start=START),
    Rung(name="full-from-v1", what="better start: `full` from v1", start="v1"),
    Rung(name="full-from-regression", what="better start: `full` from the regression", start="regression"),
    Rung(name="lora", what="LoRA, no CLIP loss", paper="13.21", word="lora", changes=_NO_CLIP, start=START),
    Rung(
        name="lora-naive",
        what="LoRA, naive CLIP loss: no clamp, constant weight",
        paper="21.32 (full)",
        word="lora",
        changes={"clip.tau": 1.0, **_CONSTANT},  # no cosine is above 1
        start=START,
    ),
    Rung(
        name="lora-clamped",
        what="LoRA, clamped CLIP loss, constant weight",
        paper="13.19 (full)",
        word="lora",
        changes=_CONSTANT,
        start=START,
    ),
    Rung(
        name="lora-falling",
        what="LoRA, clamped CLIP loss, its weight falling to 0",
        paper="11.70",
        word="lora",
        start=START,
    ),
    Rung(
        name="merge",
        what="merge of `full` and `lora-falling`, half of each",
        paper="8.77",
        merge=("full", "lora-falling"),
        curve=True,
    ),
    Rung(
        name="full-regularised",
        what="`full` with image regularisation: 5 % of the rows are pairs",
        changes=_REGULARISED,
        start=START,
        pairs=True,
    ),
    Rung(
        name="merge-regularised",
        what="merge of `full-regularised` and `lora-falling`, half of each",
        paper="8.14",
        merge=("full-regularised", "lora-falling"),
    ),
    Rung(
        name="full-guidance-range",
        what="beyond: the teacher's guidance drawn for each sample, from 1 to 2 about the 1.5 of `full`",
        changes={"vsd.guidance": (1.0, 2.0)},
        start=START,
    ),
    Rung(
        name="full-fresh-score",
        what="beyond: two updates of the score model for one of the student, one on fresh samples",
        changes={"score.updates_per_step": 2},
        start=START,
    ),
    Rung(
        name="two-step",
        what="beyond: a student of two steps",
        changes={"student.timesteps": (999, 499)},
        start=START,
    ),
)
BY_NAME = {rung.name: rung for rung in RUNGS}


def named(names: Sequence[str]) -> tuple[Rung, ...]:
    """Returns the rungs of these names, all without any; raises InputError for a name that none has."""
    for name in names:
        if name not in BY_NAME:
            raise InputError(f"--only={name}: no such rung{fields.nearest(name, BY_NAME, '')}")
    return tuple(rung for rung in RUNGS if not names or rung.name in names)


def seeds_of(text: str | None) -> tuple[int, ...]:
    """Returns the seeds of "0,1,2", all where none are given; raises InputError for what the ladder has not."""
    found = [one.strip() for one in text.split(",")] if text is not None else list(map(str, SEEDS))
    if wrong := [one for one in found if one not in map(str, SEEDS)]:
        raise InputError(f"--seeds={text}: {wrong[0]!r} is none of {', '.join(map(str, SEEDS))}")
    return tuple(dict.fromkeys(map(int, found)))


def trainings(rung: Rung) -> tuple[Rung, ...]:
    """Returns the rungs that are trained for a rung, each once and what it starts from before it."""
    found: dict[str, Rung] = {}
    for name in rung.merge or ():
        found |= {one.name: one for one in trainings(BY_NAME[name])}
    if rung.merge is None:
        if rung.start != TEACHER:
            found |= {one.name: one for one in trainings(BY_NAME[rung.start])}
        found[rung.name] = rung
    return tuple(found.values())


def overrides(rung: Rung, steps: int | None) -> dict[str, Any]:
    """Returns the fields that a rung's training has beside its configuration's, at most `steps` steps where given."""
    if steps is None:
        return dict(rung.changes)
    return {**rung.changes, "steps": min(steps, config_of(rung, None).steps)}


def config_of(rung: Rung, steps: int | None) -> ConfigDict:
    """Returns the configuration of a rung's training, without the places of what it starts from."""
    config = fields.load(f"{CONFIG}:{rung.word}").unlock()
    config.update_from_flattened_dict(overrides(rung, steps))
    if rung.pairs:
        config.pairs.path = "pairs"
    validate(config)
    return config


def recipe(rung: Rung, steps: int | None) -> dict[str, Any]:
    """Returns what decides the figures of a rung beside teacher and seed, as JSON has it: of all its trainings the
    fields that are its own or not the defaults', and what each starts from."""
    found: dict[str, Any] = {}
    for one in trainings(rung):
        config = config_of(one, steps)
        free = (*_PLACES, *(name for name in may_change(config) if name != "steps"))
        values = {name: fields.value_of(config, name) for name in fields.field_names(config)}
        settings = {
            name: value
            for name, value in values.items()
            if (value != FIELDS[name].default or name in one.changes)
            and not any(f"{name}.".startswith(f"{part}.") for part in free)
        }
        found[one.name] = {"start": one.start, **settings}
    if rung.merge:
        found["merge"] = rung.merge
    return json.loads(json.dumps(found))


def forwards(rung: Rung, steps: int | None, pair_forwards: int) -> dict[str, int]:
    """Returns the UNet's forwards for a rung, all its trainings and the pairs that they read: the teacher's, and all.

    `pair_forwards` are the teacher's for a pair. Pairs that are never read are not counted.
    """
    teacher = total = read = 0.0
    for one in trainings(rung):
        config = config_of(one, steps)
        images = config.steps * config.batch_size
        each = forwards_of_an_image(config)
        teacher, total = teacher + images * each.teacher, total + images * each.all
        if one.pairs:
            rows = config.steps * rows_of(config.pairs.share, config.batch_size)
            read = max(read, min(pair_count(steps, pair_forwards), rows))
    return {"teacher": round(teacher + read * pair_forwards), "all": round(total + read * pair_forwards)}


def pair_count(steps: int | None, pair_forwards: int) -> int:
    """Returns how many pairs cost the teacher as many forwards as `full` does; a batch takes that many at least."""
    config = config_of(BY_NAME["full"], steps)
    images = config.steps * config.batch_size
    return max(config.batch_size, round(images * forwards_of_an_image(config).teacher) // pair_forwards)
