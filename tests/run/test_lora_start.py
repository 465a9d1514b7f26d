"""A LoRA training that starts from a file: what it starts with, and which files are not its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_reference
from conftest import relative_error
from diffusers import UNet2DConditionModel
from made_run import make_run
from ml_collections import ConfigDict
from scipy.stats import ks_2samp
from tiny_pipeline import write_pipeline

from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.convert.lora.files import modules_of
from sbv2_jax.convert.lora.write import FORMATS, save_lora
from sbv2_jax.devices.sharding import make_mesh, shardings
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.run.arrays import load_state, read_start
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config, validate
from sbv2_jax.run.export import export_lora
from sbv2_jax.run.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    write_pipeline(directory)
    (directory / "prompts.txt").write_text("a dog\na red apple\n")
    return directory


def make_config(world: Path, **changes: object) -> ConfigDict:
    config = default_config()
    config.update(teacher=str(world / "pipeline"), prompts=str(world / "prompts.txt"), batch_size=2)
    config.student.mode = "lora"
    config.student.lora.update(rank=4, alpha=8.0)
    config.score.update(rank=2, alpha=3.0)
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("player", ["student", "score"])
def test_a_new_lora_of_a_run_starts_as_pefts(world, player):
    """The score model's and a student's: every factor has the shape, and all have the distribution, of PEFT's own."""
    values = {"rank": 512, "alpha": 1024.0, "targets": r".*\.attn[12]\.to_(q|k|v|out\.0)"}
    group = "student.lora" if player == "student" else "score"
    config = make_config(world, **{f"{group}.{name}": value for name, value in values.items()})
    run = assemble(config, read_parts(config))
    state = load_state(run, shardings(run.state_shapes, make_mesh(1, 1, 1)))
    ours = params_to_torch(state.players[player].params)
    torch.manual_seed(5)
    unet = UNet2DConditionModel.from_pretrained(world / "pipeline", subfolder="unet")
    theirs = torch_reference.weights(torch_reference.with_lora(unet, values))
    theirs = {name: leaf for name, leaf in theirs.items() if ".lora." in name}
    assert {name: leaf.shape for name, leaf in ours.items()} == {n: leaf.shape for n, leaf in theirs.items()}
    pools = []
    for side in (ours, theirs):
        down = [leaf * leaf.shape[1] ** 0.5 for name, leaf in side.items() if ".down." in name]
        assert all(not leaf.any() for name, leaf in side.items() if ".up." in name)
        assert all(0.95 < np.abs(leaf).max() < 1 + 1e-6 for leaf in down), "U(-1, 1) / sqrt(features in)"
        pools.append(np.concatenate([leaf.ravel() for leaf in down]))
    assert pools[0].size > 20_000
    assert ks_2samp(*pools).statistic < 2.2 * (2 / pools[0].size) ** 0.5  # beyond it once in 10,000 times


def test_the_lora_of_a_run_is_where_another_starts(world, tmp_path):
    made = make_run(world, "low", **{"student.mode": "lora"})
    config = make_config(world)
    run = assemble(config, read_parts(config))
    placement = shardings(run.state_shapes, make_mesh(1, 1, 1))
    for file_format in FORMATS:
        file = tmp_path / f"{file_format}.safetensors"
        export_lora(made.directory, file, which="student", file_format=file_format)
        state = load_state(run, placement, read_start(run, str(file)))
        for trained in (state.student, state.ema):
            assert trained.keys() == made.state.student.keys()
            for name, leaf in made.state.student.items():
                np.testing.assert_array_equal(trained[name], leaf)
    new = load_state(run, placement)
    assert not any(leaf.any() for name, leaf in new.student.items() if ".up." in name), (
        "without a file: zeros"
    )
    assert all(
        np.array_equal(new.players["score"].params[name], leaf)
        for name, leaf in state.players["score"].params.items()
    )


def test_a_file_of_another_strength_starts_the_same_update(world, tmp_path, rng):
    """What it adds to the weights is kept: alpha / rank is 2 in the run, 0.75 in the file."""
    config = make_config(world)
    run = assemble(config, read_parts(config))
    drawn = {
        name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in run.state_shapes.student.items()
    }
    save_lora(tmp_path / "lora.safetensors", drawn, 3.0)
    got = read_start(run, str(tmp_path / "lora.safetensors"))
    for module in modules_of(drawn):
        (down, up), (want_down, want_up) = (
            [one[f"{module}.lora.{part}.kernel"] for part in ("down", "up")] for one in (got, drawn)
        )
        np.testing.assert_array_equal(down, want_down)
        assert relative_error(2 * (down @ up), 0.75 * (want_down @ want_up)) < 1e-6


def file_of(world: Path, path: Path, *, alpha: float = 8.0, rank: int = 4, targets: str = "") -> Path:
    changes = {"student.lora.rank": rank} | ({"student.lora.targets": targets} if targets else {})
    config = make_config(world, **changes)
    run = assemble(config, read_parts(config))
    save_lora(path, lora.base_and_factors(run.method.student.network.init(0))[1], alpha)
    return path


REFUSED = {
    "another rank": (
        {"rank": 3, "alpha": 6.0},
        r"to_q.lora.down.kernel has shape \(8, 3\), expected \(8, 4\)",
    ),
    "fewer layers": (
        {"targets": r".*\.attn1\.to_(q|k|v|out\.0)"},
        r"missing down_blocks.0.*attn2.to_q.lora.down",
    ),
    "more layers": (
        {"targets": r".*\.(attn[12]\.to_(q|k|v|out\.0)|linear_1)"},
        "unexpected time_embedding.linear_1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_the_runs_own_is_refused_before_anything_is_written(world, tmp_path, case):
    options, message = REFUSED[case]
    file = file_of(world, tmp_path / "lora.safetensors", **options)
    with pytest.raises(InputError, match=message) as error:
        train(make_config(world, **{"student.lora.init": str(file)}), tmp_path / "run")
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_and_a_full_training(world, tmp_path):
    with pytest.raises(InputError, match="none.safetensors: No such file"):
        train(
            make_config(world, **{"student.lora.init": str(tmp_path / "none.safetensors")}), tmp_path / "run"
        )
    with pytest.raises(InputError, match="config.student.lora.init = 'x' needs config.student.mode = 'lora'"):
        validate(make_config(world, **{"student.lora.init": "x", "student.mode": "full"}))
    assert not (tmp_path / "run").exists()
