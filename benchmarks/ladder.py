"""Climbs the ladder: trains the rungs of the paper's tables in the OpenMoji world, measures them, writes the page.

python benchmarks/ladder.py --workdir=runs/ladder                   (days; goes on where it was interrupted)
python benchmarks/ladder.py --workdir=runs/ladder --only=full --only=merge --seeds=0
python benchmarks/ladder.py --workdir=runs/ladder --dry_run         (the commands that would run)
python benchmarks/ladder.py --page                                  (the page alone, from what is there)

What is kept of a rung, a small file in docs/ladder, is what another machine need not run again. Exit code 1 where a
rung has failed; the others are climbed all the same.
"""

import contextlib
from argparse import Namespace
from pathlib import Path

from sbv2_jax import cli
from sbv2_jax.cli import Flag, path
from sbv2_jax.errors import InputError
from sbv2_jax.fields import text, whole

FLAGS = (
    Flag("workdir", "Directory of the runs and reports.", path, text()),
    Flag("only", "The name of a rung; may be given several times. Default: all.", several=True),
    Flag("seeds", "Seeds of the students: numbers with commas. Default: 0,1,2.", str, text()),
    Flag("count", "Pictures of each row, at least 4. Default: 2000.", int, whole(4)),
    Flag("steps", "The most steps that a training takes. Default: each its own.", int, whole(1)),
    Flag("out", "Directory of the page and of what is kept, in ladder/. Default: docs.", path, text()),
    Flag("machine", "A name for this machine. Default: its accelerator or processor.", str, text()),
    Flag("page", "Write the page from what is kept, and run nothing.", bool),
    Flag("dry_run", "Print the commands, and run nothing.", bool),
)


def main(given: Namespace) -> int:
    if (given.count or given.steps) and not given.out:
        raise InputError("--count and --steps shorten the ladder: give an --out, for docs/ has the whole one")
    if not given.page:
        cli.require(given, ["workdir"])
    if "," in (given.workdir or ""):
        raise InputError(
            f"--workdir={given.workdir}: a comma parts models where they are merged and measured"
        )
    from sbv2_jax.checkpoint.files import locked
    from sbv2_jax.openmoji.ladder.climb import COUNT, Ladder, climb
    from sbv2_jax.openmoji.ladder.page import write_page
    from sbv2_jax.openmoji.ladder.processes import Failed, Processes
    from sbv2_jax.openmoji.ladder.rungs import ROOT, named, seeds_of

    out, rungs, seeds = Path(given.out or ROOT / "docs"), named(given.only), seeds_of(given.seeds)
    ladder = Ladder(
        workdir=Path(given.workdir or "."),
        kept=out / "ladder",
        count=given.count or COUNT,
        steps=given.steps,
        machine=given.machine,
    )

    def told() -> None:
        if not given.dry_run:
            write_page(ladder, out / "ladder.md")

    told()
    if given.page:
        return 0
    try:
        with contextlib.ExitStack() as held:
            if not given.dry_run:
                ladder.workdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(ladder.workdir))
            failures = climb(ladder, rungs, seeds, Processes(dry_run=given.dry_run), told)
    except Failed as failure:
        raise InputError(f"the teacher cannot be measured: {failure}") from failure
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run_flags(main, FLAGS, __doc__)
