"""What a configuration becomes: schedules, sizes, and what is refused before anything is compiled."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import AutoencoderTiny
from made_run import make_run
from tiny_pipeline import write_pipeline

import sbv2_jax
from sbv2_jax.devices.sharding import make_mesh, shardings
from sbv2_jax.errors import InputError
from sbv2_jax.run import build as assemble
from sbv2_jax.run import components as parts
from sbv2_jax.run.arrays import load_state
from sbv2_jax.run.config import default_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("assemble"))


def config_of(pipeline, **changes):
    config = default_config()
    config.update(teacher=str(pipeline), batch_size=4)
    config.score.update(rank=2)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def assembled(config):
    return assemble.assemble(config, parts.read_parts(config))


def rates(optimizer, updates):
    """The learning rate of each update: what Adam subtracts where the gradient stays 1."""
    params = {"kernel": jnp.zeros(())}
    state, found = optimizer.init(params), []
    for _ in range(updates):
        change, state = optimizer.update({"kernel": jnp.ones(())}, state, params)
        found.append(-float(change["kernel"]))
    return found


@pytest.mark.parametrize("updates", [1, 5])
def test_both_rates_rise_and_end_with_the_run(pipeline, updates):
    """The score model's optimizer counts every update, of which a step may have several."""
    changes = {"steps": 10, "optimizer__schedule": "cosine", "optimizer__warmup": 2}
    changes |= {"optimizer__weight_decay": 0.0, "score__updates_per_step": updates, "score__lr": 1e-2}
    run = assembled(config_of(pipeline, student__lr=1e-3, **changes))
    student = rates(run.method.optimizers["student"], 11)
    np.testing.assert_allclose(student[:3], [0, 5e-4, 1e-3], rtol=1e-4)
    np.testing.assert_allclose(student[6], 5e-4, rtol=1e-4)
    assert student[10] == pytest.approx(0, abs=1e-9)
    score = rates(run.method.optimizers["score"], 10 * updates + 1)
    np.testing.assert_allclose(score[::updates], 10 * np.array(student), rtol=1e-4, atol=1e-8)


def test_a_decoder_of_other_latents_is_refused(pipeline, tmp_path):
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**blocks, latent_channels=16).save_pretrained(tmp_path / "wide")
    config = config_of(
        pipeline, clip__model=str(pipeline), clip__decoder=str(tmp_path / "wide"), clip__weight=0.1
    )
    with pytest.raises(InputError, match=r"wide \(config.clip.decoder\) decodes 16 latent channels.* has 4"):
        assembled(config)


def with_vae_for(folder, pipeline, directory):
    """A pipeline with its autoencoder in the place of another network."""
    copied = Path(shutil.copytree(pipeline, directory / "pipeline"))
    shutil.rmtree(copied / folder)
    return Path(shutil.copytree(copied / "vae", copied / folder)).parent


def test_a_student_that_starts_from_no_unet_is_refused(pipeline, tmp_path):
    config = config_of(pipeline, student__init=str(with_vae_for("unet", pipeline, tmp_path)))
    with pytest.raises(InputError, match="unet holds a VAEConfig, a UNetConfig is expected"):
        assembled(config)


def test_a_student_starts_from_a_run_by_what_the_run_exported(pipeline):
    made = make_run(pipeline.parent, "first")
    run = assembled(config_of(pipeline, student__init=str(made.directory)))
    placement = shardings(run.state_shapes, make_mesh(1, 1, 1))
    started = load_state(run, placement).student
    for name, leaf in made.state.ema.items():
        np.testing.assert_array_equal(started[name], leaf, err_msg=name)
    shutil.rmtree(made.directory / "export")
    with pytest.raises(InputError, match=r"config\.student\.init: .*first is a run without export/"):
        assembled(config_of(pipeline, student__init=str(made.directory)))


def test_a_clip_loss_of_no_clip_is_refused(pipeline, tmp_path):
    odd = str(with_vae_for("clip", pipeline, tmp_path))
    config = config_of(pipeline, clip__model=odd, clip__decoder="vae", clip__weight=0.1)
    with pytest.raises(InputError, match=r"config\.clip\.model: .*clip is no CLIP"):
        assembled(config)


def test_a_term_that_reads_prompts_needs_a_clip(pipeline):
    config = config_of(pipeline, clip__model=str(pipeline), clip__decoder="vae", clip__weight=0.1)
    read = parts.read_parts(config)
    assert read.term_tokenizer("clip").max_length == read.term_prompt_length("clip")
    with pytest.raises(InputError, match="vae, of which a term reads prompts, is no CLIP"):
        read.term_tokenizer("decoder")
    with pytest.raises(InputError, match="decoder holds a VAEConfig, a CLIPConfig is expected"):
        read.term_prompt_length("decoder")


def test_the_first_weight_of_the_clip_loss_hides_no_method_of_a_term(pipeline):
    config = config_of(pipeline, clip__model=str(pipeline), clip__decoder="vae", clip__weight=0.1)
    (clip,) = (term for term in assembled(config).method.terms if term.name == "clip")
    z = np.zeros((4, 8, 8, 4), np.float32)
    assert clip.start({}, z) is z and clip.weight(0) == pytest.approx(0.1)


def with_sample_size(pipeline, directory, size):
    """A pipeline whose UNet says this size."""
    copied = Path(shutil.copytree(pipeline, directory / "pipeline"))
    path = copied / "unet" / "config.json"
    values = json.loads(path.read_text()) | {"sample_size": size}
    path.write_text(json.dumps(values))
    return copied


def test_a_size_is_asked_for_where_nothing_says_it(pipeline, tmp_path):
    copied = with_sample_size(pipeline, tmp_path, None)
    with pytest.raises(InputError, match="unet does not say its sample_size: set config.resolution"):
        assembled(config_of(copied))
    with pytest.raises(InputError, match="does not say a sample_size: write it"):
        sbv2_jax.load(copied)
    assert assembled(config_of(copied, resolution=16)).method.latent_shape == (4, 4, 4)


def test_another_size_than_the_teacher_was_made_for_is_said(pipeline):
    own = config_of(pipeline)
    components = parts.read_parts(own)
    assert parts.describe_size(own, components) is None
    assert parts.describe_size(config_of(pipeline, resolution=32), components) is None
    line = parts.describe_size(config_of(pipeline, resolution=16), components)
    assert line == "config.resolution = 16: the teacher's UNet was made for 32 px"


def test_latents_are_square(pipeline, tmp_path):
    copied = with_sample_size(pipeline, tmp_path, [8, 16])
    with pytest.raises(InputError, match=r"sample_size=\(8, 16\) is not supported"):
        parts.read_parts(config_of(copied))
