"""`~` in the paths of a run: the shell leaves it as it is in --flag=~/..., and a config file may hold it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import make_run
from tiny_pipeline import write_world

from sbv2_jax.checkpoint.files import mounted
from sbv2_jax.data.prompts import open_prompts
from sbv2_jax.errors import InputError
from sbv2_jax.run.arrays import read_start
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.export import export_lora

ROOT = Path(__file__).parents[2]


def test_every_field_that_is_a_path(tmp_path, monkeypatch):
    world = write_world(tmp_path)
    made = make_run(world, "run", **{"student.mode": "lora", "ema": 0.0})
    export_lora(made.directory, tmp_path / "start.safetensors")
    shutil.copytree(world / "pipeline" / "vae_tiny", tmp_path / "taesd")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = default_config()
    config.update(teacher="~/pipeline", prompts="~/prompts.txt")
    config.student.update(init="~/pipeline/unet", mode="lora")
    config.student.lora.update(rank=4, alpha=8.0, init="~/start.safetensors")
    config.score.update(rank=2, alpha=3.0)
    config.clip.update(model="~/pipeline", decoder="~/taesd", weight=0.1)
    parts = read_parts(config)
    assert parts.teacher.directory == parts.student.directory == world / "pipeline" / "unet"
    assert (parts.networks["clip"].directory, parts.networks["decoder"].directory) == (
        world / "pipeline" / "clip",
        tmp_path / "taesd",
    )
    assert read_start(assemble(config, parts), config.student.lora.init).keys() == made.state.student.keys()
    assert list(open_prompts(config.prompts)) == (world / "prompts.txt").read_text().splitlines()
    assert mounted("~/run") == made.directory
    # A dry run looks whether there is a teacher, and would else count a published one.
    config.architecture = "sd15"
    with pytest.raises(InputError, match="pipeline/unet does not have the shapes of config.architecture"):
        read_parts(config, dry_run=True)


@pytest.mark.slow
def test_the_command_finds_its_config_file_and_its_teacher_there(tmp_path):
    write_world(tmp_path)
    shutil.copy(ROOT / "configs" / "openmoji.py", tmp_path / "run.py")
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--config=~/run.py:lora", "--workdir=~/out", "--dry_run"]
        + ["--config.teacher=~/pipeline", "--config.clip.model=~/pipeline", "--config.prompts=~/prompts.txt"]
        + [r"--config.score.targets=.*\.attn1\.to_q"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "out").exists()
