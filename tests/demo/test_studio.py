"""What the live page draws, against the pipelines beneath."""

import numpy as np
import pytest
from made_run import make_run
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.convert.merge import merge_models
from sbv2_jax.convert.model import open_model
from sbv2_jax.demo.studio import Studio
from sbv2_jax.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("studio")
    write_pipeline(directory)
    make_run(directory, "run")
    return directory


@pytest.fixture(scope="module")
def studio(world):
    names = [str(world / "run"), str(world / "pipeline")]
    return Studio(names, f"{world}/run/export,{world}/pipeline")


def sheet_of(pictures, scale=12):
    return np.concatenate(list(pictures), axis=1).repeat(scale, 0).repeat(scale, 1)


def near(one, other):
    return one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1


def test_pictures_are_the_models_own(world, studio):
    sheet, seconds, _ = studio.pictures(studio.names[0], "dog", seed=3)
    assert (
        near(sheet, sheet_of(sbv2_jax.load(world / "run" / "export").draw(["dog"], seed=3))) and seconds > 0
    )
    assert near(sheet, sheet_of(sbv2_jax.load(world / "run").draw(["dog"], seed=3)))
    teacher = sbv2_jax.load(world / "pipeline")
    sheet, *_ = studio.pictures(
        studio.names[1], "dog", seed=3, count=2, negative_prompt="apple", steps=3, guidance=2.0
    )
    want = teacher.draw(["dog"] * 2, seed=3, negative_prompt="apple", steps=3, guidance=2.0)
    assert near(sheet, sheet_of(want, 6))
    sheet, *_ = studio.between(studio.names[1], ("dog", "apple"), (3, 4), 0.25, 0.5)
    assert near(sheet, sheet_of(teacher.between(("dog", "apple"), [0.25], seeds=(3, 4), noise_shares=[0.5])))


def test_a_merge_is_that_of_the_files(world, studio, tmp_path):
    models = [open_model(world / "run" / "export"), open_model(world / "pipeline")]
    merge_models(models, [0.3, 0.7], tmp_path / "merged")
    sheet, *_ = studio.merged("dog", 0.3, seed=5)
    assert near(sheet, sheet_of(sbv2_jax.load(tmp_path / "merged").draw(["dog"], seed=5)))


def test_what_is_wrong_is_one_line(world, studio):
    with pytest.raises(InputError, match="prompt 1 of 1 is empty"):
        studio.pictures(studio.names[0], "  ")
    with pytest.raises(InputError, match="'other' is none of the models here"):
        studio.pictures("other", "dog")
    with pytest.raises(InputError, match="no two models were given"):
        Studio([str(world / "pipeline")]).merged("dog", 0.5)
    with pytest.raises(InputError, match="nowhere does not exist"):
        Studio(["/nowhere"])
    with pytest.raises(InputError, match="--merge=one: two models are expected, A,B"):
        Studio([str(world / "pipeline")], "one")
