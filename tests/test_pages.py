"""The pages: links lead somewhere, commands are ones that the programs take, and all of it is found from the README."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from commands_not_run import NOT_RUN, RUN
from documented import commands, shell_lines

from sbv2_jax import cli, fields
from sbv2_jax.openmoji.pretrain import settings
from sbv2_jax.run import config as run_config
from sbv2_jax.run.conversions import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_page_is_found_from_the_readme_which_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked


@pytest.fixture(scope="module")
def programs():
    """The modules of launch/, but for those that define flags of absl, which a process has once."""
    found = {}
    for path in (ROOT / "launch").glob("[!_]*.py"):
        if "absl" not in path.read_text(encoding="utf-8"):
            spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
            found[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[path.stem])
    return found


@pytest.mark.parametrize(
    ("page", "line"),
    [(page.name, one) for page in PAGES for line in shell_lines(page) for one in commands(line)],
)
def test_a_command_is_one_that_its_program_takes(programs, page, line):
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    name, given = (
        re.search(r"(\w+)(\.py)?$", words[words[0] == "python"])[1],
        words[1 + (words[0] == "python") :],
    )
    if name == "convert":
        cli.read_flags(given[1:], COMMANDS[given[0]].flags, "")
    elif name in programs:
        cli.read_flags(given, programs[name].FLAGS, "")
    else:
        check_run(name, given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_no_test_runs_is_named_with_its_reason(page):
    name = str(page.relative_to(ROOT))
    lines, parts = shell_lines(page), NOT_RUN.get(name, {})
    others = [line for line in lines if not any(part in line for part in parts)]
    if name in RUN:
        assert others and all(commands(line) for line in others), "not a command of this package: name it"
    else:
        # What is left of a command in quotes, or of a script's head, has a line of its own.
        assert [line for line in others if commands(line)] == []
    assert [part for part in parts if not any(part in line for line in lines)] == []
    tests = re.findall(r"tests/\w+/\w+\.py|docs/\w+\.md", " ".join(parts.values()))
    assert [one for one in tests if not (ROOT / one).is_file()] == []


def test_the_pages_that_are_run_are_those_that_are_said_to_be():
    source = (ROOT / "tests/test_page_commands.py").read_text(encoding="utf-8")
    assert sorted(re.findall(r'run_page\([^\n"]*"([\w/]+\.md)"', source)) == sorted(RUN)


def check_run(name: str, given: list[str]) -> None:
    """Checks the flags, and the fields and values of a configuration, of a program that reads one."""
    source = (ROOT / "launch" / f"{name}.py").read_text(encoding="utf-8")
    known = set(re.findall(r'(?:DEFINE_\w+|define_\w+)\(\s*"(\w+)"', source))
    flags = {word.partition("=")[0].removeprefix("--"): word.partition("=")[2] for word in given}
    changed = {
        one.removeprefix("config."): value for one, value in flags.items() if one.startswith("config.")
    }
    assert flags.keys() - {f"config.{one}" for one in changed} <= known
    if flags["config"] in ("", "..."):
        return
    declared = settings.FIELDS if name == "pretrain" else run_config.FIELDS
    assert changed.keys() <= declared.keys()
    path, _, argument = flags["config"].partition(":")
    config = fields.load(f"{ROOT / path}:{argument}").unlock()
    for one, value in changed.items():
        text = isinstance(declared[one].default, str)
        config.update_from_flattened_dict({one: value if text else ast.literal_eval(value)})
    (settings if name == "pretrain" else run_config).validate(config)


def table(page: str, name: str) -> list[list[str]]:
    """The cells of the rows between `<!-- name -->` and the next comment of a page, without the head."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2]
    rows = text.partition("\n<!--")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_hours_of_the_hardware_page_are_those_of_the_plan():
    """Images of the paper's training over a speed of the generated table; chips times hours."""
    default = run_config.FIELDS["steps"].default * run_config.FIELDS["batch_size"].default
    planned = {}
    for model, _, compiled, _, eight, thirty_two, *_ in table("scaling.md", "scaling"):
        generation = compiled.partition(":")[0]
        planned.setdefault((model, f"8 {generation}"), set()).add(eight)
        planned.setdefault((model, f"32 {generation}"), set()).add(thirty_two)
    rows = table("hardware.md", "hours")
    assert len(rows) == 8
    for model, chips, speed, hours, chip_hours in rows:
        assert speed in planned[model, chips]
        exact = default / float(speed) / 3600
        assert hours == f"{exact:.{int(exact < 20)}f}"
        assert chip_hours == f"{exact * int(chips.split()[0]):.0f}"
