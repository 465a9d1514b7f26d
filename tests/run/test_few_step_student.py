"""A student of few steps: trained, resumed, exported, drawn here, by the command and by diffusers, and refused."""

import json

import made_run
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.schedulers import scheduling_lcm
from forked_commands import ROOT, forks
from made_run import command, make_run
from parity import nchw
from PIL import Image
from their_models import listening
from tiny_pipeline import write_pipeline, write_world
from train_command import CONFIG, fields

import sbv2_jax
from sbv2_jax import checkpoint
from sbv2_jax.convert.formats.pipeline import diffusers_arguments, load_pipeline
from sbv2_jax.distill.random_numbers import further_noise, initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.fields import load
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config, validate
from sbv2_jax.run.dry_run import dry_run
from sbv2_jax.run.export import export_checkpoint
from sbv2_jax.run.loop import train

TWO, FOUR, UNEVEN = (999, 499), (999, 749, 499, 249), (999, 299)
PROMPTS = ["a red apple", "dog"]
ARGUMENTS = {
    TWO: "num_inference_steps=2",
    FOUR: "num_inference_steps=4",
    UNEVEN: "timesteps=[999, 299]",
    (399,): "timesteps=[399]",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("few"))


def config_of(world, **changes):
    config = load(str(CONFIG)).unlock()
    for name, value in fields(
        world, {"student.timesteps": TWO, "limits.latents_std": 1e4, **changes}
    ).items():
        config.update_from_flattened_dict({name: value})
    return config.lock()


def diffusers_draws(directory, monkeypatch, noise, again, **settings):
    """What diffusers' own pipeline draws, with the later noises handed to it in place of those it would draw."""
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    later = iter(torch.from_numpy(again[:, number]).permute(0, 3, 1, 2) for number in range(again.shape[1]))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(later))
    images = pipe(PROMPTS, latents=nchw(noise), guidance_scale=0, output_type="np", **settings).images
    assert next(later, None) is None, "each of the noises was taken"
    return images


@pytest.mark.parametrize(
    ("timesteps", "prediction_type"),
    [
        *((steps, kind) for steps in (TWO, FOUR) for kind in ("epsilon", "v_prediction")),
        (UNEVEN, "epsilon"),
        ((399,), "v_prediction"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_an_export_draws_in_diffusers_what_it_draws_here(
    tmp_path, rng, monkeypatch, capsys, prediction_type, timesteps
):
    write_pipeline(tmp_path, prediction_type=prediction_type)
    changes = {"student.timesteps": timesteps, "student.mode": "full"}
    export = make_run(tmp_path, "run", **changes).directory / "export"
    values = load_pipeline(export).scheduler
    assert diffusers_arguments(values) == f"{ARGUMENTS[timesteps]}, guidance_scale=0"
    assert f"pipe(prompt, {ARGUMENTS[timesteps]}, guidance_scale=0)" in capsys.readouterr().out
    shape = (2, len(timesteps), 8, 8, 4)
    noises = rng.standard_normal(shape, np.float32)
    name, value = ARGUMENTS[timesteps].split("=")
    with listening() as messages:
        want = diffusers_draws(export, monkeypatch, noises[:, 0], noises[:, 1:], **{name: json.loads(value)})
    if name == "num_inference_steps":
        assert messages == []
    ours = sbv2_jax.load(export)
    got = ours.draw(PROMPTS, noise=noises)
    assert got.std() > 10 and np.abs(want[0] - want[1]).max() > 0.05
    assert np.abs(got / 255.0 - want).max() < 2 / 255
    if timesteps == TWO:
        one = ours.draw(PROMPTS, noise=noises[:, 0], steps=1, sampler="dpm")
        assert np.abs(one / 255.0 - want).max() > 10 / 255, "one step of it is another picture"


@pytest.mark.slow
def test_what_diffusers_saves_again_is_the_same_student(tmp_path, rng):
    write_pipeline(tmp_path)
    export = make_run(tmp_path, "run", **{"student.timesteps": UNEVEN}).directory / "export"
    DiffusionPipeline.from_pretrained(export).save_pretrained(tmp_path / "again")
    noises = rng.standard_normal((2, 2, 8, 8, 4), np.float32)
    first, second = (sbv2_jax.load(path).draw(PROMPTS, noise=noises) for path in (export, tmp_path / "again"))
    assert np.array_equal(first, second)


def test_a_published_lcm_draws_as_in_diffusers(tmp_path, rng, monkeypatch):
    """Its file says no timesteps: the number of steps is the caller's, the spacing the scheduler's."""
    path = write_pipeline(tmp_path)
    LCMScheduler.from_config(load_pipeline(path).scheduler).save_pretrained(path / "scheduler")
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "LCMScheduler"))
    noises = rng.standard_normal((2, 4, 8, 8, 4), np.float32)
    want = diffusers_draws(path, monkeypatch, noises[:, 0], noises[:, 1:], num_inference_steps=4)
    got = sbv2_jax.load(path).draw(PROMPTS, noise=noises, steps=4)
    assert np.abs(got / 255.0 - want).max() < 2 / 255


@pytest.mark.slow
def test_a_picture_depends_on_its_prompt_seed_and_index_alone(tmp_path):
    write_pipeline(tmp_path)
    ours = sbv2_jax.load(make_run(tmp_path, "run", **{"student.timesteps": FOUR}).directory / "export")
    three = ours.draw(["a dog", *PROMPTS], seed=3)
    alone = ours.draw(PROMPTS[:1], seed=3, indices=[1])
    assert np.abs(three[1].astype(int) - alone[0]).max() <= 1
    noise = np.asarray(initial_noise(3, [1], (8, 8, 4)))
    given = ours.draw(PROMPTS[:1], seed=3, indices=[1], noise=noise)
    assert np.abs(given.astype(int) - alone).max() <= 1, (
        "noise alone is z: the rest is of the seed and the index"
    )
    other = ours.draw(PROMPTS[:1], seed=4, indices=[1], noise=noise)
    assert np.abs(other.astype(int) - alone).max() > 5
    with pytest.raises(InputError, match=r"\(1, 2, 8, 8, 4\): finite float32 \(1, 4, 8, 8, 4\) is expected"):
        ours.draw(PROMPTS[:1], noise=noise[:, None].repeat(2, 1))
    with pytest.raises(InputError, match="steps=5: this LCMScheduler gives 1 to 4"):
        ours.draw(PROMPTS, steps=5)


def test_noises_of_further_steps_are_each_their_own():
    noises = further_noise(0, range(3), (8, 8, 4), 3)
    first = initial_noise(0, range(3), (8, 8, 4))
    rows = np.concatenate([np.asarray(noises).reshape(9, -1), np.asarray(first).reshape(3, -1)])
    assert np.abs(np.corrcoef(rows) - np.eye(12)).max() < 0.25
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05
    np.testing.assert_array_equal(further_noise(0, [2], (8, 8, 4), 1)[0, 0], noises[2, 0])
    assert further_noise(0, range(3), (8, 8, 4), 0) is None


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits_and_its_export_is_drawn_by_the_command(world, tmp_path):
    """With pictures of progress and the probe of the latents."""
    changes = {"seed": 5, "optimizer.schedule": "constant", "clip.weight": 0.0}
    for workdir, lengths in (("straight", (4,)), ("resumed", (2, 4))):
        for steps in lengths:
            config = config_of(world, **changes | {"steps": steps, "sample.every": 4})
            assert train(config, tmp_path / workdir) == 0
    runs = [checkpoint.load(tmp_path / name / "checkpoints", None, "")[1] for name in ("straight", "resumed")]
    assert runs[0].keys() == runs[1].keys()
    assert all(np.array_equal(runs[0][name], leaf) for name, leaf in runs[1].items())
    lines = [json.loads(line) for line in (tmp_path / "resumed/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and not any(line["skipped"] for line in lines)

    out = tmp_path / "pictures"
    of_resumed = ["launch/generate.py", f"--model={tmp_path / 'resumed' / 'export'}", f"--out={out}"]
    flags = ["--prompt=a dog", "--prompt=dog", "--seed=7", "--batch_size=1"]
    done = forks().run([*of_resumed, *flags], ROOT)
    assert done.code == 0, done.said
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["steps"], settings["sampler"]) == (2, "lcm")
    want = sbv2_jax.load(tmp_path / "straight" / "export").draw(["a dog", "dog"], seed=7)
    for index, picture in enumerate(want):
        drawn = np.asarray(Image.open(out / f"{index:05d}.png")).astype(int)
        assert np.abs(drawn - picture).max() <= 1


@pytest.mark.slow
def test_a_checkpoint_is_converted_with_its_timesteps(tmp_path):
    write_pipeline(tmp_path)
    run = make_run(tmp_path, "run", **{"student.timesteps": TWO, "student.mode": "lora"}).directory
    code, out, err = command("to-diffusers", f"--run={run}", f"--out={tmp_path / 'out'}")
    assert code == 0, err
    assert f"{tmp_path / 'out'}: in diffusers, pipe(prompt, num_inference_steps=2, guidance_scale=0)" in out
    assert load_pipeline(tmp_path / "out").schedule_config.timesteps == TWO


def test_a_checkpoint_from_before_the_field_is_of_the_one_step_student(tmp_path, monkeypatch):
    def older(*args, config, **settings):
        del config["student"]["timesteps"]
        return checkpoint.Checkpoints(*args, config=config, **settings)

    monkeypatch.setattr(made_run, "Checkpoints", older)
    write_pipeline(tmp_path)
    export_checkpoint(make_run(tmp_path, "old").directory, tmp_path / "out")
    assert load_pipeline(tmp_path / "out").scheduler["_class_name"] == "DDPMScheduler"


@pytest.mark.parametrize("value", [(499, 999), (999, 999), (999.5,), (999, 0), "999", (True,)], ids=str)
def test_timesteps_of_a_configuration_are_checked(value):
    config = default_config().unlock()
    with config.ignore_type():
        config.student.timesteps = value
    with pytest.raises(
        InputError, match="config.student.timesteps must be a tuple of whole numbers"
    ) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_timesteps_beyond_the_schedule_are_refused_and_the_last_alone_is_the_one_step_student(world):
    config = config_of(world, **{"student.timesteps": (1000, 499)})
    with pytest.raises(InputError, match="^config.student.timesteps = .*from 1 to 999 are expected"):
        assemble(config, read_parts(config))
    schedules = []
    for timesteps in ((), (999,)):
        config = config_of(world, **{"student.timesteps": timesteps})
        schedules.append(assemble(config, read_parts(config)).method.student.schedule)
    assert schedules[0].timesteps == schedules[1].timesteps == ()


def test_pairs_are_of_students_of_one_step(world):
    config = default_config()
    config.update(terms=("vsd", "regression"))
    config.pairs.path = "runs/pairs"
    validate(config)
    config.student.timesteps = TWO
    with pytest.raises(
        InputError, match=r"config.student.timesteps = \(999, 499\) does not go with 'regression'"
    ):
        validate(config)


def test_a_dry_run_tells_the_forwards_of_the_steps_before(world):
    config = config_of(world, **{"student.timesteps": FOUR})
    assert "student of 4 steps, at 999, 749, 499, 249: of 0 to 3" in dry_run(
        config, assemble(config, read_parts(config)), {}
    )
