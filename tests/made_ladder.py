"""What the commands of the ladder would leave, made of numbers: reports, metrics, and the processes that write them."""

import json
from pathlib import Path

JUDGES = ("efficientnet-lite0", "efficientnet-lite2")
WAYS = {"FD": "lower", "KID": "lower", "recall": "higher", "drawing": "higher"}
RULE = {
    part: {label: {figure: WAYS[figure] for figure in figures} for label in JUDGES}
    for part, figures in {"decisive": ("FD", "KID"), "guarded": ("recall", "drawing")}.items()
}
# The teacher's at its best.
FIGURES = {"FD": 70.0, "KID": 0.04, "precision": 0.5, "recall": 0.2, "density": 0.6, "coverage": 0.4,
           "drawing": 0.87, "background": 0.66, "size": 0.88, "place": 0.63, "diversity": 0.3}  # fmt: skip
WIDTH = {"FD": 1.5, "KID": 0.002}


def interval(value: float, half: float) -> dict:
    return {"value": value, "low": value - half, "high": value + half}


def row(settings: dict, forwards: int | None, shift: float = 0.0) -> dict:
    """A row whose FD and KID are worse than the teacher's by a shift of the widths of their intervals."""
    figures = {
        label: {
            name: interval(value + shift * WIDTH.get(name, 0.0), WIDTH.get(name, 0.01))
            for name, value in FIGURES.items()
        }
        for label in JUDGES
    }
    return {"name": str(settings), "settings": settings, "forwards": forwards, "figures": figures}


def comparison(name: str, seeds: int, shift: float) -> dict:
    differences = {
        label: {
            figure: [interval(shift * WIDTH.get(figure, 0.0), WIDTH.get(figure, 0.002))] * seeds
            for figure in WAYS
        }
        for label in JUDGES
    }
    return {"name": name, "rival": "r", "differences": differences, "verdict": {"word": "w", "reasons": []}}


class Commands:
    """Stands for the processes: notes each command, and writes what the ladder reads of it.

    `shift` is by how much students are worse than the teacher, `codes` the exit code of commands that have a part.
    """

    def __init__(self, shift: float = -2.0, codes: dict[str, int] | None = None):
        self.shift, self.codes, self.given = shift, codes or {}, []

    def __call__(self, command: list[str]) -> int:
        self.given.append(command)
        line = " ".join(command)
        for part, code in self.codes.items():
            if part in line:
                return code
        flags = [word.removeprefix("--").partition("=")[::2] for word in command[2:]]
        if command[1].endswith("train.py"):
            self._train(Path(dict(flags)["workdir"]))
        elif command[1].endswith("evaluate.py"):
            self._evaluate(flags)
        return 0

    def names(self) -> list[str]:
        """The programs that ran, with the directory of a run or the split that was measured."""
        found = []
        for command in self.given:
            flags = dict(word.removeprefix("--").partition("=")[::2] for word in command[2:])
            program = Path(command[1]).stem
            found.append(f"{program} {Path(flags.get('workdir', '')).name or flags.get('split', '')}".strip())
        return found

    def _train(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "seconds_per_step": 60.0, "latents/std": 1.15} for step in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (run / "starts.jsonl").write_text(json.dumps({"device": "NVIDIA H100"}))

    def _evaluate(self, flags: list[tuple[str, str]]) -> None:
        given = dict(flags)
        seeds = [int(value) for name, value in flags if name == "seed"] or [0]
        if given.get("steps"):  # the sweep: 4 steps with guidance 2 are best
            rows = [
                row({"model": "bundled", "steps": steps, "guidance": guidance, "sampler": "dpm", "seed": 0},
                    steps * (1 + (guidance > 1)), abs(steps - 4) + abs(guidance - 2))
                for steps in (2, 4, 8) for guidance in (1.0, 2.0)
            ]  # fmt: skip
            comparisons = []
        elif given.get("weight", "").count(":"):
            rows = [
                row({"weight": weight / 10, "steps": 1, "seed": 0}, 1, abs(weight - 6))
                for weight in range(11)
            ]
            comparisons = []
        else:
            best = {"model": "bundled", "steps": 4, "guidance": 2.0, "sampler": "dpm"}
            rows = [row(best | {"seed": seed}, 8) for seed in seeds]
            models = [value for name, value in flags if name == "model"]
            if "pictures" in given:
                rows += [
                    row({"model": "bundled", "steps": 1, "guidance": 1.0, "seed": seed}, 1, 20)
                    for seed in seeds
                ]
                rows.append(row({"pictures": "real"}, None, -20))
            elif len(models) > 1 or "merge" in given:
                students = [row({"model": "s", "steps": 1, "seed": seed}, 1, self.shift) for seed in seeds]
                rows += [one | {"name": "student"} for one in students]
            comparisons = [comparison("student", len(seeds), self.shift)]
        if given.get("judge"):
            for one in rows:
                del one["figures"]["efficientnet-lite2"]
        out = Path(given["out"])
        out.mkdir(parents=True, exist_ok=True)
        report = {"sources": rows, "comparisons": comparisons, "rule": RULE}
        (out / "report.json").write_text(json.dumps(report))
        (out / "report.html").write_text("<html>")
