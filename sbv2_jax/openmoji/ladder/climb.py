"""Climbing: the commands that train and measure each rung, and the file that is kept of it."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbv2_jax.openmoji.ladder import results
from sbv2_jax.openmoji.ladder.processes import Failed, Processes
from sbv2_jax.openmoji.ladder.results import bundle_digest
from sbv2_jax.openmoji.ladder.rungs import (
    CONFIG,
    LAMBDA,
    ROOT,
    TEACHER,
    Rung,
    forwards,
    overrides,
    pair_count,
    recipe,
    trainings,
)
from sbv2_jax.openmoji.ladder.teacher import SWEEP, Setting, best_row
from sbv2_jax.run.directory import EXPORT

COUNT = 2000  # pictures of each row, as the protocol has them
NOISE = (0, 1, 2)  # seeds of the noise of every row
# Diversity is of several pictures of a prompt: on fewer prompts, by one network.
_DIVERSE = ("--images=4", "--judge=efficientnet-lite0")
_DIVERSE_COUNT = 200
_WEIGHTS = "0:1:0.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Where the ladder is climbed and kept, and how much of it.

    Runs and reports are in `workdir`, `kept` holds the small files of results. `count` pictures are of each row,
    `steps` the most that a training takes, None for all of its own. `machine` is a name for it, None for its processor
    or accelerator.
    """

    workdir: Path
    kept: Path
    count: int = COUNT
    steps: int | None = None
    machine: str | None = None

    def result(self, name: str, seed: int) -> Path:
        """The file that is kept of a rung."""
        return self.kept / f"{name}-{seed}.json"

    @property
    def teacher(self) -> Path:
        """The file that is kept of the teacher."""
        return self.kept / "teacher.json"

    def run(self, name: str, seed: int) -> Path:
        """The directory of a run."""
        return self.workdir / f"{name}-{seed}"


def wanted_of_teacher(ladder: Ladder) -> dict[str, Any]:
    """Returns what a result of the teacher must be made of."""
    sweep = SWEEP | {"count": min(SWEEP["count"], ladder.count)}
    return {"bundle": bundle_digest(), "count": ladder.count, "sweep": sweep}


def wanted_of(ladder: Ladder, rung: Rung, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a result of a rung must be made of, beside this result of the teacher."""
    return {
        "bundle": teacher["made_of"]["bundle"],
        "rival": str(Setting.of(teacher["best"])),
        "count": ladder.count,
        "recipe": recipe(rung, ladder.steps),
    }


def climb(
    ladder: Ladder,
    rungs: Sequence[Rung],
    seeds: Sequence[int],
    processes: Processes,
    told: Callable[[], None],
) -> list[str]:
    """Trains and measures every rung that is not kept yet, the first seed of all before the second.

    `told` is called when there is more to tell: after the teacher, and each rung. Returns what failed, a line each; the
    others are climbed all the same. Raises Failed where the teacher cannot be measured, and Stopped after a signal.
    """
    teacher = measured_teacher(ladder, processes)
    if teacher is None:
        print("what follows depends on the teacher's best setting, which is measured first")
        return []
    told()
    failures = []
    for seed in seeds:
        for rung in (one for one in rungs if seed in one.seeds):
            wanted, path = wanted_of(ladder, rung, teacher), ladder.result(rung.name, seed)
            found = results.read(path)
            if found and not results.stale(found, wanted):
                continue
            try:
                _climb_one(ladder, rung, seed, Setting.of(teacher["best"]), wanted, processes)
                told()
            except Failed as failure:
                failures.append(f"{rung.name}-{seed}: {failure}")
                print(failures[-1], file=sys.stderr, flush=True)
    return failures


def measured_teacher(ladder: Ladder, processes: Processes) -> dict[str, Any] | None:
    """Returns the result of the teacher, swept and measured where none is kept; None where nothing is run."""
    wanted, found = wanted_of_teacher(ladder), results.read(ladder.teacher)
    if found and not results.stale(found, wanted):
        return found
    sweep = wanted["sweep"]
    on_validation = ["--split=validation", f"--count={sweep['count']}"]
    settings = [f"--steps={sweep['steps']}", f"--guidance={sweep['guidance']}"]
    both = ["--model=bundled,sampler=ddim", "--model=bundled,sampler=dpm"]
    swept = _measured(ladder, processes, "sweep", [*on_validation, *both, *settings])
    if swept is None:
        return None
    best = Setting.of(best_row(swept["sources"], swept["rule"])["settings"])
    models = [f"--model={best.model}", "--model=bundled", "--pictures=real"]
    measured = _measured(ladder, processes, TEACHER, [*models, *_on_test(ladder)])
    diverse = _measured(ladder, processes, f"{TEACHER}-diversity", [models[0], *_diverse(ladder)])
    if measured is None or diverse is None:
        return None
    result = {
        "made_of": wanted,
        "best": best._asdict(),
        "rows": results.kept_rows(measured["sources"]),
        "diversity": _diversity(diverse, 0),
        "machine": ladder.machine or results.processor(),
        "commit": results.commit(),
    }
    results.write(ladder.teacher, result)
    return json.loads(ladder.teacher.read_text(encoding="utf-8"))


def train_command(ladder: Ladder, rung: Rung, seed: int) -> list[str]:
    """Returns the command of a rung's own training."""
    changes = overrides(rung, ladder.steps) | {"seed": seed, "checkpoint.keep": 1}
    if rung.start != TEACHER:
        changes["student.init"] = str(ladder.run(rung.start, seed) / EXPORT)
    if rung.pairs:
        changes["pairs.path"] = str(ladder.workdir / "pairs")
    config = f"{CONFIG}:{rung.word}" if rung.word else str(CONFIG)
    fields = [f"--config.{name}={value}" for name, value in changes.items()]
    return [*_program("train"), f"--config={config}", f"--workdir={ladder.run(rung.name, seed)}", *fields]


def pairs_command(ladder: Ladder, rival: Setting) -> list[str]:
    """Returns the command that draws the pairs, as many as cost the teacher what `full` does."""
    setting = [f"--steps={rival.steps}", f"--guidance={rival.guidance:g}"]
    setting += [f"--sampler={rival.sampler}"] if rival.sampler else []
    count = pair_count(ladder.steps, rival.forwards)
    given = ["--model=bundled", "--prompts=openmoji", f"--count={count}", *setting]
    return [*_program("pairs"), *given, f"--out={ladder.workdir / 'pairs'}"]


def _climb_one(
    ladder: Ladder, rung: Rung, seed: int, rival: Setting, wanted: Mapping[str, Any], processes: Processes
) -> None:
    needed = trainings(rung)
    if any(one.pairs for one in needed):
        processes.run(pairs_command(ladder, rival))
    for one in needed:
        processes.run(train_command(ladder, one, seed))
    name = f"{rung.name}-{seed}"
    merge = ",".join(str(ladder.run(one, seed)) for one in rung.merge or ())
    model = (
        [f"--merge={merge}", f"--weight={LAMBDA}"] if merge else [f"--model={ladder.run(rung.name, seed)}"]
    )
    both = [f"--model={rival.model}", *model]
    measured = _measured(ladder, processes, name, [*both, *_on_test(ladder)])
    diverse = _measured(ladder, processes, f"{name}-diversity", [*both, *_diverse(ladder)])
    curve = None
    if rung.curve:
        # On validation prompts, so that a weight may be chosen by it.
        on = ["--split=validation", f"--count={ladder.count}", f"--merge={merge}", f"--weight={_WEIGHTS}"]
        curve = _measured(ladder, processes, f"{name}-curve", on)
    if measured is None or diverse is None:
        return
    runs = [ladder.run(one.name, seed) for one in needed]
    result = {
        "rung": rung.name,
        "seed": seed,
        "made_of": wanted,
        **results.compared(measured),
        "diversity": _diversity(diverse, 1),
        "curve": results.kept_rows(curve["sources"]) if curve else [],
        "training": results.trained(runs) | {"forwards": forwards(rung, ladder.steps, rival.forwards)},
        "machine": ladder.machine or results.machine_of(runs[-1]),
        "commit": results.commit(),
    }
    results.write(ladder.result(rung.name, seed), result)
    print(f"kept: {ladder.result(rung.name, seed)}", flush=True)


def _program(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / f"{name}.py")]


def _measured(ladder: Ladder, processes: Processes, name: str, flags: Sequence[str]) -> dict[str, Any] | None:
    """Returns the report of an evaluation, which is kept under its name; None where nothing is run."""
    # One directory for all, so that the teacher is drawn once on a machine, not once for each rung.
    out, own = ladder.workdir / "measured", ladder.workdir / "measured" / name
    processes.run([*_program("evaluate"), "--protocol=openmoji", f"--out={out}", *flags])
    if processes.dry_run:
        return None
    own.mkdir(exist_ok=True)
    for report in ("report.json", "report.html"):
        (out / report).replace(own / report)
    return json.loads((own / "report.json").read_text(encoding="utf-8"))


def _on_test(ladder: Ladder) -> list[str]:
    return ["--split=test", f"--count={ladder.count}", *(f"--seed={seed}" for seed in NOISE)]


def _diverse(ladder: Ladder) -> list[str]:
    return ["--split=test", f"--count={min(_DIVERSE_COUNT, ladder.count)}", *_DIVERSE]


def _diversity(report: Mapping[str, Any], row: int) -> list[float | None]:
    (figures,) = report["sources"][row]["figures"].values()
    return results.compact(figures["diversity"])
