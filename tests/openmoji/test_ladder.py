"""The ladder: its commands, what is kept and not run again, and what the page says of it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from made_ladder import Commands
from ml_collections import config_flags

from sbv2_jax import cli
from sbv2_jax.checkpoint.files import locked
from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.intervals import Interval
from sbv2_jax.evaluate.measure import Comparison, Evaluation, Row
from sbv2_jax.evaluate.report import as_json
from sbv2_jax.evaluate.verdict import Verdict
from sbv2_jax.openmoji.ladder import climb as climbing
from sbv2_jax.openmoji.ladder import page, processes, results
from sbv2_jax.openmoji.ladder.climb import Ladder, climb, train_command
from sbv2_jax.openmoji.ladder.page import Standing, write_page
from sbv2_jax.openmoji.ladder.processes import Processes, Stopped
from sbv2_jax.openmoji.ladder.rungs import (
    BY_NAME,
    RUNGS,
    SEEDS,
    forwards,
    named,
    pair_count,
    recipe,
    seeds_of,
    trainings,
)
from sbv2_jax.openmoji.protocol import openmoji
from sbv2_jax.run.config import validate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    monkeypatch.setattr(climbing, "bundle_digest", lambda: "b" * 64)
    return Ladder(workdir=tmp_path / "work", kept=tmp_path / "docs" / "ladder", machine="a machine")


@pytest.fixture
def commands(monkeypatch):
    """Puts a `Commands` in the place of processes."""

    def put(**given) -> Commands:
        stand_in = Commands(**given)
        monkeypatch.setattr(processes, "_exit_code", stand_in)
        return stand_in

    return put


def text_of(ladder) -> str:
    path = ladder.kept.parent / "ladder.md"
    write_page(ladder, path)
    return path.read_text(encoding="utf-8")


def nothing() -> None:
    """What is called when there is more to tell."""


def line_of(text: str, begins: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(begins))


def program(name):
    spec = importlib.util.spec_from_file_location(f"ladder_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if not rung.merge], ids=lambda rung: rung.name)
def test_a_rung_s_training_is_one_that_the_command_takes(ladder, rung, monkeypatch):
    """Parsed as launch/train.py parses it, and valid."""
    given, values = train_command(ladder, rung, 2), flags.FlagValues()
    assert Path(given[1]) == ROOT / "launch" / "train.py"
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    monkeypatch.setattr(sys, "argv", given[1:])  # where a config flag looks for its fields
    values(given[1:])
    config = values.config
    validate(config)
    assert config.seed == 2 and values.workdir == str(ladder.workdir / f"{rung.name}-2")
    for name, value in rung.changes.items():
        found = config
        for part in name.split("."):
            found = found[part]
        assert found == value
    start = "teacher" if rung.start == "teacher" else str(ladder.workdir / f"{rung.start}-2" / "export")
    assert config.student.init == start
    assert config.pairs.path == (str(ladder.workdir / "pairs") if rung.pairs else "")


def test_the_baseline_costs_what_the_full_training_does():
    full = forwards(BY_NAME["full"], None, 8)
    assert forwards(BY_NAME["regression"], None, 8) == full == {"teacher": 51_200, "all": 128_000}
    merge = forwards(BY_NAME["merge"], None, 8)
    assert merge["all"] == full["all"] + forwards(BY_NAME["lora-falling"], None, 8)["all"]
    assert pair_count(20, 16) == 160 and pair_count(1, 16) == 64, "a batch of it takes 64"


def test_what_a_rung_needs_comes_before_it_and_decides_its_recipe():
    names = [one.name for one in trainings(BY_NAME["full-from-regression"])]
    assert names == ["regression", "full-from-regression"]
    found = recipe(BY_NAME["full-from-v1"], None)
    assert list(found) == ["v1", "full-from-v1"] and found["full-from-v1"]["start"] == "v1"
    assert found["v1"]["vsd.score_guidance"] == 1.5 and "sample.every" not in found["v1"]
    assert recipe(BY_NAME["lora"], 3)["lora"]["steps"] == 3
    constant, falling = (recipe(BY_NAME[name], None)[name] for name in ("lora-clamped", "lora-falling"))
    assert constant.pop("clip.schedule") == "constant" and constant == falling
    for rung in RUNGS:
        for name in (*(rung.merge or ()), *([rung.start] if rung.start != "teacher" else [])):
            assert not BY_NAME[name].merge


def test_names_and_seeds_that_there_are_not_are_refused():
    with pytest.raises(InputError, match="--only=ful: no such rung.*full"):
        named(["ful"])
    with pytest.raises(InputError, match="--seeds=0,7: '7' is none of 0, 1, 2"):
        seeds_of("0,7")
    assert named([]) == RUNGS and seeds_of("2,0") == (2, 0)


def test_the_page_says_that_nothing_has_been_run(ladder):
    text = text_of(ladder)
    assert "**Nothing has been run on this teacher yet.**" in text
    assert "Its best setting has not been measured yet." in text
    for rung in RUNGS:
        assert line_of(text, f"| `{rung.name}` |").endswith("| not run yet |")
    assert text.index("## The rule") < text.index("## The rungs")


def test_a_rung_is_climbed_kept_and_not_climbed_again(ladder, commands):
    stand_in = commands()
    rungs = named(["full", "merge"])
    told = []
    assert climb(ladder, rungs, (0,), Processes(), lambda: told.append(len(stand_in.given))) == []
    assert told == [3, 6, 10], "after the teacher and each rung"
    assert stand_in.names() == [
        "evaluate validation", "evaluate test", "evaluate test",  # the teacher
        "train full-0", "evaluate test", "evaluate test",
        "train lora-falling-0", "evaluate test", "evaluate test", "evaluate validation",
    ]  # fmt: skip
    for given in stand_in.given:
        if (name := Path(given[1]).stem) == "evaluate":
            cli.read_flags(given[2:], program(name).FLAGS, "")
    (measured,) = [one for one in stand_in.given if f"--merge={ladder.workdir}/full-0,{ladder.workdir}/lora-falling-0"
                   in one and "--weight=0.5" in one and "--seed=2" in one]  # fmt: skip
    assert "--model=bundled,steps=4,guidance=2,sampler=dpm" in measured and "--count=2000" in measured
    kept = results.read(ladder.result("full", 0))
    assert kept["training"] | {"mib": 0} == {
        "minutes": 3.0, "latents/std": 1.15, "mib": 0, "forwards": {"teacher": 51200, "all": 128000},
    }  # fmt: skip
    assert (kept["machine"], kept["made_of"]["rival"]) == ("a machine", "4 steps, guidance 2, dpm")
    assert [one["forwards"] for one in kept["rows"]] == [1, 1, 1] and kept["rows"][0]["settings"]["seed"] == 0
    assert ladder.result("full", 0).stat().st_size < 12_000
    assert (ladder.workdir / "measured" / "full-0" / "report.html").is_file()

    again = commands()
    assert climb(ladder, rungs, (0,), Processes(), nothing) == [] and again.given == []
    # on a machine of which nothing was left but the files
    elsewhere = Ladder(workdir=ladder.workdir / "elsewhere", kept=ladder.kept)
    assert climb(elsewhere, rungs, (0,), Processes(), nothing) == [] and again.given == []


def test_what_is_kept_is_read_from_a_report_as_an_evaluation_writes_it(tmp_path):
    protocol = openmoji(count=6)
    names = [*protocol.decisive, *protocol.guarded, ("efficientnet-lite0", "size")]

    def row(name, forwards, **settings):
        figures = {one: Interval(1 / 3, 0.1, 0.5) for one in names}
        return Row(name=name, settings=settings, fingerprint="", figures=figures, directory=tmp_path, rate=1.0,
                   forwards=forwards)  # fmt: skip

    rows = [row("rival", 8, model="bundled", seed=seed) for seed in (0, 1)]
    rows += [row("student", 1, model="runs/x", seed=seed) for seed in (0, 1)]
    differences = {one: [Interval(-1.0, -2.0, -0.5), Interval(-3.0, None, None)] for one in names}
    one = Comparison(
        name="student",
        rival="rival",
        seeds=(0, 1),
        differences=differences,
        verdict=Verdict("matches", ("why",)),
    )
    better = protocol.better()
    report = as_json(
        Evaluation(protocol=protocol, rows=rows, comparisons=[one], references={}, better=better), "c"
    )
    path = tmp_path / "kept.json"
    results.write(path, {"made_of": {"lr": 0.123456789}} | results.compared(json.loads(json.dumps(report))))
    kept = results.read(path)
    assert kept["made_of"] == {"lr": 0.123456789} and "    [-1.0, -2.0, -0.5],\n" in path.read_text()
    assert [(one["settings"], one["forwards"]) for one in kept["rows"]] == [
        ({"seed": 0}, 1),
        ({"seed": 1}, 1),
    ]
    assert kept["rows"][0]["figures"]["efficientnet-lite0"]["size"] == [0.333333, 0.1, 0.5]
    assert kept["differences"]["efficientnet-lite2"]["KID"] == [[-1.0, -2.0, -0.5], [-3.0, None, None]]
    assert "size" not in kept["differences"]["efficientnet-lite0"]
    assert kept["verdict"] == {"word": "matches", "reasons": ["why"]}
    standing = Standing(rung=BY_NAME["full"], found=[kept], stale={})
    assert standing.said == "matches so far (1 of 3 seeds)"
    assert standing.verdict.reasons[0] == "efficientnet-lite0 FD: not better for certain in 1 of 2 seeds"


@pytest.mark.parametrize(
    ("shift", "word", "said"),
    [
        (-2.0, "wins", "FD and KID are better for certain with both networks for every seed"),
        (0.0, "matches", "efficientnet-lite0 FD: not better for certain in 9 of 9 seeds"),
        (2.0, "loses", "efficientnet-lite2 KID: not better for certain in 9 of 9 seeds"),
    ],
)
def test_the_page_says_what_the_verdict_of_all_seeds_is(ladder, commands, shift, word, said):
    commands(shift=shift)
    climb(ladder, named(["full"]), SEEDS, Processes(), nothing)
    text = text_of(ladder)
    assert "its best setting was **4 steps, guidance 2, dpm**: 8 forwards a picture" in text
    best = line_of(text, "| **teacher** | at its best: 4 steps, guidance 2, dpm |")
    assert "| 70.0 (1.5) | 70.0 (1.5) | 40.0 (2.0) | 40.0 (2.0) | 0.20 (0.01) | 87.0 (1.0) |" in best
    row = line_of(text, "| `full` | full training")
    shown = f"| {70 + 1.5 * shift:.1f} (1.5) |"
    assert shown in row and row.endswith(f"| **{word}** |")
    assert said in line_of(text, f"- `full` {word}: ")
    assert (
        f"| `full` | 3 x 3 | {1.5 * shift:+.1f} [{1.5 * (shift - 1):+.1f}, {1.5 * (shift + 1):+.1f}] |"
        in text
    )
    assert "| `full` | 128 | 51 | 3 | 1.15 | 1 |" in text and "| a machine |" in text
    assert ("These win: `full`." in text) == (word == "wins")
    assert line_of(text, "| real pictures |").split(" | ")[3] == "40.0 (1.5)"
    assert line_of(text, "| `v1` |").endswith("| not run yet |")


def test_a_verdict_of_fewer_seeds_is_provisional_and_no_win(ladder, commands):
    commands(shift=-2.0)
    climb(ladder, named(["full"]), (0,), Processes(), nothing)
    text = text_of(ladder)
    assert line_of(text, "| `full` | full training").endswith("| **wins so far (1 of 3 seeds)** |")
    assert "1 of 45 runs are there, 0 of 15 rungs with all their seeds." in text and "These win" not in text


def test_the_curve_of_the_merge_is_drawn_and_says_where_it_is_best(ladder, commands):
    commands()
    climb(ladder, named(["merge"]), (0, 1), Processes(), nothing)
    text = text_of(ladder)
    assert "![figures of the merge over lambda](ladder/merge.png)" in text
    assert (ladder.kept / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert "Best by FD and KID with both networks: lambda 0.6, 0.6 (seeds 0, 1)." in text
    assert line_of(text, "| 0.6 |").startswith("| 0.6 | 70.0 (1.5) | 40.0 (2.0) | 0.50 (0.01) |")


def test_another_teacher_or_recipe_makes_results_stale_and_they_are_run_again(ladder, commands, monkeypatch):
    commands()
    climb(ladder, named(["full"]), (0,), Processes(), nothing)
    shorter = Ladder(workdir=ladder.workdir, kept=ladder.kept, steps=7)
    assert line_of(text_of(shorter), "| `full` | full training").endswith("| stale: of another recipe |")
    monkeypatch.setattr(climbing, "bundle_digest", lambda: "c" * 64)
    text = text_of(ladder)
    assert line_of(text, "| `full` | full training").endswith("| stale: of another teacher |")
    assert "1 results are stale: they will be run again." in text and "Its best setting has not" in text
    again = commands()
    climb(ladder, named(["full"]), (0,), Processes(), nothing)
    assert len(again.given) == 6 and results.read(ladder.result("full", 0))["made_of"]["bundle"] == "c" * 64


def test_a_rung_that_fails_leaves_the_others_and_what_it_has_begun_is_not_run_twice(ladder, commands):
    stand_in = commands(codes={"workdir=" + str(ladder.workdir / "v1-0"): 70})
    failures = climb(ladder, named(["v1", "full-from-v1", "lora"]), (0,), Processes(), nothing)
    assert [one.partition(":")[0] for one in failures] == ["v1-0", "full-from-v1-0"]
    assert "exit code 70 of: " in failures[0] and stand_in.names().count("train v1-0") == 1
    assert ladder.result("lora", 0).is_file() and not ladder.result("v1", 0).exists()


def test_a_dry_run_prints_the_commands_and_starts_none(ladder, commands, capsys):
    stand_in = commands()
    climb(ladder, named(["two-step"]), (1,), Processes(dry_run=True), nothing)
    said = capsys.readouterr().out
    assert "--split=validation" in said and "the teacher's best setting, which is measured first" in said
    climb(ladder, named(["full"]), (0,), Processes(), nothing)
    stand_in.given.clear()
    capsys.readouterr()
    climb(ladder, named(["full", "regression"]), (0,), Processes(dry_run=True), nothing)
    said = capsys.readouterr().out
    assert stand_in.given == [] and "full-0" not in said
    pairs, train, *_ = said.splitlines()
    given = pairs.split()[2:]
    assert {"--count=6400", "--steps=4", "--guidance=2", "--sampler=dpm"} <= set(given)
    cli.read_flags(given, program("pairs").FLAGS, "")
    assert "--config.steps=1200" in train and "regression-0" in train


def test_a_signal_is_passed_on_once_and_ends_the_ladder_when_the_command_has_saved(tmp_path):
    saved, script = tmp_path / "saved", tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"def save(*_): open({str(saved)!r}, 'a').write('x'); time.sleep(0.5); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        Processes().run([sys.executable, str(script)])
    assert stopped.value.code == 75 and saved.read_text() == "x" and time.monotonic() - began < 50
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # A terminal that is closed too, of which no command is told otherwise.
    script.write_text(
        script.read_text().replace("os.getppid(), signal.SIGTERM", "os.getppid(), signal.SIGHUP")
    )
    with pytest.raises(Stopped):
        Processes().run([sys.executable, str(script)])
    assert saved.read_text() == "xx"


def test_a_command_that_a_signal_has_stopped_alone_ends_the_ladder():
    with pytest.raises(Stopped):
        Processes().run([sys.executable, "-c", "raise SystemExit(75)"])


def test_two_ladders_cannot_share_a_directory(tmp_path):
    with locked(tmp_path):
        done = ladder_command(tmp_path, f"--workdir={tmp_path}", f"--out={tmp_path / 'docs'}")
    assert done.returncode == 2 and f"{tmp_path} is in use by process {os.getpid()}" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [("<<<<<<< ours\n{}\n", "is not readable JSON"), ("{}", "is not what benchmarks/ladder.py keeps")],
)
def test_a_result_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "teacher.json").write_text(text)
    with pytest.raises(InputError, match=f"teacher.json.*{said}"):
        results.read(tmp_path / "teacher.json")


def test_a_commit_of_changed_code_has_a_plus_and_without_git_there_is_none(monkeypatch):
    assert page._short("a" * 40 + "+") == "aaaaaaa+" and page._short("a" * 40) == "aaaaaaa"
    assert page._short(None) == page._UNKNOWN
    monkeypatch.setenv("PATH", "")
    assert results.commit() is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--count=8", "--workdir=w"], "error: --count and --steps shorten the ladder: give an --out"),
        ([], "error: missing --workdir"),
        (["--workdir=a,b"], "error: --workdir=a,b: a comma parts models"),
        (["--workdir=w", "--seeds="], "error: --seeds="),
        (["--page", "--only=mege"], "error: --only=mege: no such rung"),
        (["--page", "--steps=0", "--out=o"], "error: --steps=0: must be a whole number >= 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(given, said, tmp_path):
    done = ladder_command(tmp_path, *given)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_page_in_the_repository_is_what_the_command_writes(tmp_path):
    kept = sorted((ROOT / "docs" / "ladder").glob("*")) if (ROOT / "docs" / "ladder").is_dir() else []
    (tmp_path / "ladder").mkdir()
    for path in kept:
        (tmp_path / "ladder" / path.name).write_bytes(path.read_bytes())
    done = ladder_command(tmp_path, "--page", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "ladder.md").read_text(encoding="utf-8")
    page = ROOT / "docs" / "ladder.md"
    assert page.read_text(encoding="utf-8") == written, "run python benchmarks/ladder.py --page"


def ladder_command(directory: Path, *given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "ladder.py"), *given]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )
