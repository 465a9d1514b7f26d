"""The shell of the commands, as real processes: one line on stderr, exit code 2, nothing written."""

import fnmatch
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sbv2_jax
from sbv2_jax import cli
from sbv2_jax.diffusion.samplers import SAMPLERS
from sbv2_jax.generate.inference import NEGATIVE_SCALE
from sbv2_jax.openmoji.pretrain import settings
from sbv2_jax.openmoji.protocol import JUDGES
from sbv2_jax.openmoji.world import PROMPT_KINDS
from sbv2_jax.run.config_fields import FIELDS

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
from absl import flags
from ml_collections import config_flags
from sbv2_jax import cli
from sbv2_jax.run import config
from sbv2_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file("config")
WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory")

def main():
    config.validate(CONFIG.value)
    assert "jax" not in sys.modules
    if WORKDIR.value == "bad":
        raise InputError("two\\n  lines")
    if WORKDIR.value == "bug":
        raise RuntimeError("a bug")
    if WORKDIR.value == "decoder":
        raise OSError("a bug: no errno")
    if WORKDIR.value == "missing":
        open("/nowhere/at/all")
    if WORKDIR.value == "full":
        with open("/dev/full", "w") as file:
            file.write("x")
    print(CONFIG.value.student.lr, CONFIG.value.sample.prompts)
    return 3 if WORKDIR.value == "three" else None

cli.run(main, required=("config", "workdir"))
"""

COMMANDS = """
from sbv2_jax import cli
def did(given):
    print("did", given.model)
command = cli.Command((cli.Flag("model", "A model.", cli.path),), did)
cli.run_commands({"to-diffusers": command, "from-diffusers": command}, "Converts.")
"""


def call(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )


RUN = ("--config=configs/openmoji.py", "--workdir=x")
REFUSED = {
    "misspelt group": ((*RUN, "--config.studnet.lr=1"), "did you mean --config.student.lr?"),
    "misspelt leaf": ((*RUN, "--config.student.lrr=1"), "did you mean --config.student.lr?"),
    "leaf without its group": ((*RUN, "--config.guidance=1"), "did you mean --config.vsd.guidance?"),
    "as two words": ((*RUN, "--config.stepz", "3"), "did you mean --config.steps?"),
    "group": ((*RUN, "--config.student=3"), "--config.student is a group"),
    "wrong type": ((*RUN, "--config.student.lr=abc"), "--config.student.lr=abc: could not convert"),
    "whole number": ((*RUN, "--config.steps=1.5"), "--config.steps=1.5: invalid literal for int()"),
    "range": ((*RUN, "--config.student.lr=nan"), "config.student.lr must be a finite number > 0, not nan"),
    "conflict": ((*RUN, "--config.vsd.t_min=990"), "config.vsd.t_min = 990 must be below"),
    "no file": (("--config=configs/openmojo.py", "--workdir=x"), "no config file 'configs/openmojo.py'"),
    "argument": (("--config=configs/openmoji.py:locl", "--workdir=x"), "unknown config argument 'locl'"),
    "override first": (("--config.steps=3", *RUN), "before a value for --config was specified"),
    "override alone": (("--config.steps=3", "--workdir=x"), "needs a --config=FILE.py"),
    "missing flag": (RUN[:1], "missing --workdir (see --help)"),
    "missing flags": ((), "missing --config, --workdir (see --help)"),
    "unknown flag": ((*RUN, "--wrkdir=3"), "Did you mean: workdir ?"),
    "twice": ((*RUN, "--workdir=y"), "--workdir is given twice; it takes one value"),
    "two files": ((*RUN, "--config", "configs/gpu.py"), "--config is given twice"),
    "field twice": ((*RUN, "--config.steps=3", "--config.steps", "4"), "--config.steps is given twice"),
    "positional": ((*RUN, "extra"), "unexpected argument 'extra'"),
    "raised by main": ((RUN[0], "--workdir=bad"), "two lines"),
    "a missing file": ((RUN[0], "--workdir=missing"), "error: /nowhere/at/all: No such file or directory"),
    "a full disk": ((RUN[0], "--workdir=full"), "error: No space left on device"),
}


@pytest.fixture(scope="module")
def refused() -> dict[str, subprocess.CompletedProcess]:
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(REFUSED, pool.map(lambda case: call(SCRIPT, *case[0]), REFUSED.values()), strict=True)
        )


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(refused, case):
    result = refused[case]
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert REFUSED[case][1] in result.stderr


def test_good_input_reaches_main_with_its_overrides():
    result = call(SCRIPT, *RUN, "--config.student.lr=1", "--config.sample.prompts=('a b', 'c')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "1.0 ('a b', 'c')\n", "")


def test_the_exit_code_of_main_and_a_bug():
    assert call(SCRIPT, RUN[0], "--workdir=three").returncode == 3
    for name, line in (("bug", "RuntimeError: a bug"), ("decoder", "OSError: a bug: no errno")):
        result = call(SCRIPT, RUN[0], f"--workdir={name}")
        assert result.returncode == 1 and "Traceback" in result.stderr and line in result.stderr


def test_commands():
    assert call(COMMANDS, "to-diffusers", "--model", "x").stdout == "did x\n"
    result = call(COMMANDS, "to-difusers")
    assert result.returncode == 2
    assert result.stderr == "error: unknown command 'to-difusers'; did you mean to-diffusers?\n"
    assert call(COMMANDS).stderr == "error: one command is expected: to-diffusers, from-diffusers\n"


PROGRAMS = ("train", "compile", "pretrain", "generate", "convert")
WITHOUT_JAX = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "jax" not in sys.modules
"""


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_of_every_program_come_without_jax(flag):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda name: call(WITHOUT_JAX, f"launch/{name}.py", flag), PROGRAMS))
    for name, result in zip(PROGRAMS, results, strict=True):
        assert (result.returncode, result.stderr) == (0, "")
        if flag == "--version":
            assert result.stdout == f"sbv2_jax {sbv2_jax.__version__}\n"
        else:
            assert f"launch/{name}.py" in result.stdout and "--version" in result.stdout


def test_help_explains_every_field_of_the_configuration():
    for program, declared in (("train", FIELDS), ("pretrain", settings.FIELDS)):
        out = call(WITHOUT_JAX, f"launch/{program}.py", "--help").stdout
        for name, field in declared.items():
            assert f"\n  {name} = {field.default!r}\n    {field.help}\n" in out + "\n"
        assert "\n  --workdir: " in out


def test_a_tuple_takes_an_item_from_each_of_its_flags():
    result = call(SCRIPT, *RUN, "--config.sample.prompts='a b'", "--config.sample.prompts='c'")
    assert (result.returncode, result.stdout) == (0, "0.0004 ('a b', 'c')\n"), result.stderr


def test_the_samplers_of_the_command_are_those_that_there_are():
    out = call(WITHOUT_JAX, "launch/generate.py", "--model=x", "--out=y", "--sampler=x").stderr
    assert out == "error: --sampler=x: must be one of " + ", ".join(map(repr, SAMPLERS)) + "\n"


def test_the_strength_of_a_negative_prompt_is_that_of_the_library():
    assert f"Default: {NEGATIVE_SCALE}." in call(WITHOUT_JAX, "launch/generate.py", "--help").stdout


def test_the_kinds_and_judges_of_the_command_are_those_of_the_world():
    for flag, names in (("kind", PROMPT_KINDS), ("judge", JUDGES)):
        given = ("--protocol=openmoji", "--out=y", f"--{flag}=x")
        out = call(WITHOUT_JAX, "launch/evaluate.py", *given).stderr
        assert out == f"error: --{flag}=x: must be one of " + ", ".join(map(repr, names)) + "\n"


# Where no TPU is and nothing is said of one: libtpu comes with the [test] extra.
UNSAID = ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE")
QUIET = (
    ("convert", "inspect", "--model=bundled"),
    ("generate", "--model=bundled", "--prompt=a red apple", "--out={}/one.png"),
    ("train", "--config=configs/openmoji.py:runlocal", "--workdir={}/run", "--dry_run"),
)


@pytest.mark.parametrize("arguments", QUIET, ids=lambda arguments: arguments[0])
@pytest.mark.slow
def test_libtpu_is_quiet_where_no_tpu_is(tmp_path, arguments):
    environment = {name: value for name, value in os.environ.items() if name not in UNSAID}
    program, *others = (argument.format(tmp_path) for argument in arguments)
    done = subprocess.run(
        [sys.executable, f"launch/{program}.py", *others],
        capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize(
    "name", ["JAX_PLATFORMS", "TPU_NAME", "TPU_WORKER_HOSTNAMES", "/dev/accel0", "/dev/vfio/0"]
)
def test_who_speaks_of_a_tpu_or_has_one_is_not_overruled(monkeypatch, name):
    for one in UNSAID:
        monkeypatch.delenv(one, raising=False)
    if name.startswith("/dev"):
        monkeypatch.setattr(cli.glob, "glob", lambda pattern: [name] * fnmatch.fnmatch(name, pattern))
    else:
        monkeypatch.setenv(name, "tpu")
    before = dict(os.environ)
    cli.quiet_libtpu()
    assert dict(os.environ) == before
    # A machine without one, on which nothing is said.
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cli.quiet_libtpu()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
