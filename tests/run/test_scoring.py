"""A run that measures its student: the figures in its log, the best step that is kept, and the export of it."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_pipeline import write_world
from train_command import command, metrics, run

from sbv2_jax import checkpoint
from sbv2_jax.checkpoint.files import step_numbers
from sbv2_jax.checkpoint.manifest import best_step, read_manifest
from sbv2_jax.evaluate.measure import evaluate
from sbv2_jax.fields import imported
from sbv2_jax.run import evaluation

pytestmark = pytest.mark.slow

# A protocol with a network of random weights, whose figures fall and rise with the student's colours.
PROTOCOL = """
import dataclasses

import numpy as np
import jax.numpy as jnp

from sbv2_jax.evaluate.extractors.extractor import Extractor
from sbv2_jax.evaluate.extractors.networks import open_inception
from sbv2_jax.evaluate.extractors.program import Program
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.pictures import Made
from sbv2_jax.evaluate.protocol import Panel, Protocol


def extractor():
    kernel = np.random.default_rng(0).normal(size=(8 * 8 * 3, 5)).astype(np.float32)

    def features(params, pictures):
        return {"features": pictures.astype(jnp.float32).reshape(len(pictures), -1) / 255 @ params["kernel"]}

    return Extractor(
        name="tiny", fingerprint="tiny", resize=lambda picture, side: picture[::4, ::4], side=8,
        program=Program(features, {"kernel": kernel}, per_device=2),
    )


def protocol(count):
    texts = ["a red apple", "a dog", "an apple", "red dog"]
    return Protocol(
        name="tiny", prompts=[texts[index % 4] for index in range(count)], of=np.arange(count),
        panels=(Panel(label="tiny", open=extractor, metrics=(METRICS["kernel"],), names={"kernel": "KID"}),),
        prepare=lambda picture: picture, prepared="as they are",
        real=Made("noise", count, lambda i: np.random.default_rng(i).integers(0, 256, (32, 32, 3)).astype(np.uint8)),
    )


def without_weights(count):
    whole = protocol(count)
    judge = dataclasses.replace(whole.panels[0], open=lambda: open_inception("/nowhere/inception"))
    return dataclasses.replace(whole, panels=(judge,))
"""
FIGURE = "evaluate/tiny/KID"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = write_world(tmp_path_factory.mktemp("world"))
    (directory / "tiny.py").write_text(PROTOCOL)
    return directory


def changes(**more):
    return {
        "evaluate.every": 2, "evaluate.protocol": "{}/tiny.py:protocol", "evaluate.count": 70,
        "evaluate.best": FIGURE, "student.lr": 3e-3, "sample.every": 0, "checkpoint.keep": 1, "checkpoint.every": 3,
        "steps": 8, "optimizer.schedule": "constant", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    code, out, error = run(command(world, workdir, **changes(**{"evaluate.export": "best"})))
    assert code == 0, error
    return workdir, out


def test_figures_are_in_the_log_and_the_best_step_is_kept_and_exported(world, measured):
    workdir, out = measured
    lines = metrics(workdir)
    figures = {line["step"]: line[FIGURE] for line in lines if FIGURE in line}
    assert list(figures) == [2, 4, 6, 8] and len(set(figures.values())) == 4
    best = min(figures, key=figures.get)
    kept = step_numbers(workdir / "checkpoints")
    assert set(kept) == {best, 8} and best_step(workdir / "checkpoints", FIGURE, "lower") == best
    assert read_manifest(workdir / "checkpoints" / str(best), best).extra == {FIGURE: figures[best]}
    assert f"export/ is of step {best}, the best by {FIGURE}" in out
    _, student, _ = checkpoint.load(workdir / "checkpoints", best, "ema.")
    exported = load_file(workdir / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(exported["conv_in.bias"], student["conv_in.bias"])


def test_the_command_measures_a_step_as_the_run_did(world, measured, tmp_path):
    """The run's own networks on its mesh, and the pipeline that its checkpoint makes."""
    workdir, _ = measured
    protocol = imported(f"{world}/tiny.py:protocol", "protocol")(count=70)
    spec = {
        "model": str(workdir),
        "steps": (1,),
        "guidance": (1.0,),
        "sampler": "dpm",
        "step": 8,
        "which": "ema",
    }
    found = evaluate(protocol, evaluation._of_model(spec, [0], 16), tmp_path / "out", tmp_path / "cache")
    value = found.rows[0].figures["tiny", "KID"].value
    wanted = next(line[FIGURE] for line in metrics(workdir) if line["step"] == 8)
    assert value == pytest.approx(wanted, rel=1e-3)
    assert found.rows[0].name == f"{workdir} (ema of step 8), 1 step"


def test_a_run_that_goes_on_keeps_the_best_step_of_before(world, measured, tmp_path):
    workdir, _ = measured
    # more steps, whose student is far off: the best one stays
    code, _, error = run(command(world, workdir, "--force", **changes(**{"steps": 12, "student.lr": 0.3})))
    assert code == 0, error
    figures = {line["step"]: line[FIGURE] for line in metrics(workdir) if FIGURE in line}
    assert list(figures) == [2, 4, 6, 8, 10, 12]
    assert set(step_numbers(workdir / "checkpoints")) == {min(figures, key=figures.get), 12}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"evaluate.best": "evaluate/tiny/FID"}, "is none of evaluate/tiny/KID"),
        ({"evaluate.protocol": ""}, "needs config.evaluate.protocol"),
        ({"evaluate.protocol": "{}/tiny.py:extractor"}, "is no function of count="),
        ({"evaluate.protocol": "{}/none.py:protocol"}, "no file"),
        ({"evaluate.protocol": "{}/tiny.py:without_weights"}, "/nowhere/inception does not exist"),
        (
            {"evaluate.best": "", "evaluate.export": "best"},
            "needs config.evaluate.every and config.evaluate.best",
        ),
    ],
)
def test_a_wrong_protocol_is_one_line_and_nothing_is_written(world, tmp_path, wrong, message):
    code, _, error = run(command(world, tmp_path / "run", **changes(**wrong)))
    assert code == 2 and message in error.splitlines()[-1], error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_what_the_judges_hold(world, tmp_path):
    code, out, err = run(command(world, tmp_path / "run", "--dry_run", **changes()))
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("tiny, judge"))
    assert line.split()[2:] == [f"{8 * 8 * 3 * 5:,}", "0.000", "0.000"]
    assert not (tmp_path / "run").exists()
