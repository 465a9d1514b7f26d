"""The pages: links lead somewhere, commands are ones that the programs take, and all of it is found from the README."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def commands() -> Iterator[tuple[str, str]]:
    """Every command of the programs in a page's shell blocks, with the page's name."""
    for page in PAGES:
        for block in re.findall(
            r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|--command='|--docker-image=\S+", line):
                    if re.search(r"python launch/\w+\.py|\bsbv2-\w+", part):
                        yield page.name, re.sub(r"^.*?(?=python launch/|sbv2-)", "", part).rstrip("' ")


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


@pytest.mark.parametrize(("page", "line"), list(commands()))
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
