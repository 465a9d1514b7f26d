"""The Dockerfile, as far as it can be tried without Docker: what it copies can be installed, and has what it calls."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_its_extras_are_ones_that_there_are():
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    declared = re.search(r"extras_require=\{(.*?)\}", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    assert set(extras.split(",")) <= set(re.findall(r'"(\w+)":', declared))


@pytest.mark.slow
def test_what_it_copies_installs_the_command_that_it_runs(tmp_path):
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    context = tmp_path / "context"
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, context / name)
    installed = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={installed}", context],
        check=True,
    )
    (arguments,) = re.findall(r"^CMD (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    program, *_ = json.loads(arguments)
    dry = [installed / "bin" / program, "--config=configs/gpu.py:runlocal", "--workdir=w", "--dry_run"]
    found = subprocess.run(
        dry,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "student" in found.stdout
    assert (installed / "sbv2_jax" / "openmoji" / "bundled" / "unet" / "config.json").is_file()
