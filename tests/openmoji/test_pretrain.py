"""Pre-training: what each network learns from a few samples, and every stage end to end on a tiny world."""

import json
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from forked_commands import Forked, forks
from ml_collections import ConfigDict
from tiny_pretraining import tiny_config

import sbv2_jax
from sbv2_jax import checkpoint
from sbv2_jax.convert.formats.pipeline import load_pipeline
from sbv2_jax.errors import InputError
from sbv2_jax.models.clip import CLIPTextConfig
from sbv2_jax.models.clip_image import CLIPImageConfig
from sbv2_jax.models.registry import network
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.openmoji.pretrain import loop, losses, settings, stages, unet, vae
from sbv2_jax.openmoji.pretrain.pictures import in_batches, to_float
from sbv2_jax.openmoji.pretrain.run import pretrain
from sbv2_jax.run.preemption import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def training(**changes) -> ConfigDict:
    """The settings of a stage's training."""
    group = settings.default_config().vae
    group.update(changes)
    return group


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Measures the figures on few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_HELD_OUT", 32)
        patch.setattr(stages, "_PROMPTS", {"seen": 4, "recombined": 2, "held_out": 2})
        yield


# Learning


def overfit(loss, params, inputs, metric: str, steps: int, lr: float) -> tuple[dict, list[float]]:
    """Trains on a few samples; returns the parameters and the metric at every step."""
    group = training(steps=steps, batch_size=4, lr=lr, ema=0.5)
    group.warmup = 5
    optimizer = loop.make_optimizer(group, 0.3, 1.0)
    step = jax.jit(loop.make_step(loss, optimizer, 0.5, 0))
    params = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    state = loop.StageState(
        step=jnp.zeros((), jnp.int32), params=params, opt=optimizer.init(params), ema=params
    )
    history = []
    for _ in range(steps):
        state, metrics = step(state, inputs)
        history.append(float(metrics[metric]))
    return state.ema, history


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([openmoji.example("train", index).image[::2, ::2] for index in range(4)])


def test_vae_overfits_four_pictures_and_standardising_keeps_them(pictures):
    config = tiny_config()
    config.vae.update(kl=1e-5, widths=(8, 16, 16))
    vae_config = vae.vae_config(config.vae, 32)
    net = network(vae_config)
    params, history = overfit(
        vae.vae_loss(net, config.vae),
        loop.quiet_branches(net.init(0)),
        {"pictures": pictures},
        "loss/picture",
        60,
        5e-3,
    )
    assert history[0] > 1.5
    assert np.mean(history[-10:]) < 0.6

    encode = jax.jit(lambda p, x: net.apply(p, to_float(x), method="encode")[0])
    latents = in_batches(encode, params, pictures)
    host = {name: np.asarray(leaf) for name, leaf in params.items()}
    standard, moved, factor = vae.standardise(host, latents)
    assert relative_error(in_batches(encode, standard, pictures), moved) < 1e-4
    scaled = moved * factor
    assert np.abs(scaled.mean((0, 1, 2))).max() < 1e-4
    assert np.allclose(scaled.std((0, 1, 2)), 1, atol=1e-4)
    decode = jax.jit(lambda p, z: net.apply(p, z, method="decode"))
    assert relative_error(in_batches(decode, standard, moved), in_batches(decode, params, latents)) < 1e-4


def test_standardising_moves_the_log_variance_with_the_latents(pictures):
    net = network(vae.vae_config(tiny_config().vae, 32))
    params = {name: jnp.asarray(leaf) for name, leaf in net.init(3).items()}
    encode = jax.jit(lambda p, x: net.apply(p, to_float(x), method="encode"))
    mean, log_variance = encode(params, pictures)
    standard, moved, _ = vae.standardise({k: np.asarray(v) for k, v in params.items()}, np.asarray(mean))
    ratio = moved.std((0, 1, 2)) / np.asarray(mean).std((0, 1, 2))
    expected = np.asarray(log_variance) + 2 * np.log(ratio)
    assert relative_error(encode(standard, pictures)[1], expected) < 1e-4


def test_unet_overfits_four_latents_told_apart_by_their_captions(rng):
    config = tiny_config()
    config.unet.update(widths=(16,), caption_dropout=0.0, batch_size=32, guidance=1.0, sample_steps=4)
    text_config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4, bos_token_id=18, eos_token_id=19, pad_token_id=19,
    )  # fmt: skip
    net, text = network(unet.unet_config(config.unet, 16, 4, 4)), network(text_config)
    text_params = {name: 4 * leaf for name, leaf in text.init(1).items()}
    ids = np.full((4, 1, 4), 19, np.int32)
    ids[:, 0, 0], ids[:, 0, 1] = 18, np.arange(4)
    # Pictures of one value each: which one it is, only the caption says at the last timestep.
    latents = np.broadcast_to(np.float32([-1.5, -0.5, 0.5, 1.5]).reshape(4, 1, 1, 1), (4, 4, 4, 4))
    inputs = {"latents": latents, "ids": ids, "null": ids[0, 0]}
    loss = unet.unet_loss(net, text, config.unet)
    start = unet.join(loop.quiet_branches(net.init(0)), text_params)
    params, history = overfit(loss, start, inputs, "loss/v", 200, 5e-3)
    assert history[0] > 0.5
    assert np.mean(history[-20:]) < 0.08

    sample = jax.jit(unet.sampler(net, text, ids[:1, 0], config.unet))
    drawn = sample(params, (ids[:, 0], unet.noise(4, latents)))
    assert np.abs(drawn - latents).mean() < 0.3


def test_decoder_learns_on_from_latents_with_noise_and_leaves_the_encoder_alone(pictures):
    config = tiny_config()
    config.vae.update(widths=(8, 16, 16))
    config.decoder.batch_size = 4
    net = network(vae.vae_config(config.vae, 32))
    decoder, rest = vae.decoder_of(net.init(0))
    assert {name.split(".")[0] for name in decoder} == {"decoder", "post_quant_conv"}
    assert {name.split(".")[0] for name in rest} == {"encoder", "quant_conv"}
    latents = np.random.default_rng(0).standard_normal((4, 8, 8, 8)).astype(np.float32)
    inputs = {"pictures": pictures, "latents": latents, "rest": rest}
    loss = vae.decoder_loss(net, config.decoder, scaling_factor=0.5)
    # Without noise it is the loss of the decoder's pictures; noise of the latents makes it another.
    quiet = config.decoder.copy_and_resolve_references()
    quiet.noise = 0.0
    at = jax.random.key(1)
    plain = vae.decoder_loss(net, quiet, scaling_factor=0.5)(decoder, inputs, at)[0]
    rows = loop.draw_rows(jax.random.split(at, 3)[0], 4, pictures)
    decoded = net.apply({**rest, **decoder}, latents[rows] / 0.5, method="decode")
    wanted = losses.picture_loss(decoded, to_float(pictures[rows]), quiet.edges).mean()
    assert relative_error(plain, wanted) < 1e-5
    assert abs(loss(decoder, inputs, at)[0] - plain) > 1e-4
    _, history = overfit(loss, decoder, inputs, "loss/picture", 40, 5e-3)
    assert np.mean(history[-5:]) < 0.75 * history[0]


def test_half_of_the_times_are_uniform_half_in_proportion_to_themselves_and_spread_evenly():
    t = np.asarray(unet.draw_times(jax.random.key(3), 64, 1000))
    assert t.min() >= 0 and t.max() <= 999
    # The share below t, and no stretch of it has two more or fewer samples than its share.
    for limit in range(100, 1001, 100):
        assert abs(np.sum(t < limit) - 64 * (limit / 1000 + (limit / 1000) ** 2) / 2) <= 1
    assert len(set(t.tolist())) > 55
    assert not np.array_equal(t, unet.draw_times(jax.random.key(4), 64, 1000))


def test_fresh_unet_predicts_zero():
    net = network(unet.unet_config(tiny_config().unet, 16, 8, 4))
    x, t = jnp.ones((1, 8, 8, 4)), jnp.zeros((1,), jnp.int32)
    assert not np.any(jax.jit(net.apply)(loop.quiet_branches(net.init(0)), x, t, jnp.ones((1, 3, 16))))


# End to end


class Killed(Exception):
    """Stands for the death of the process."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    pretrain(tiny_config(), workdir, "python launch/pretrain.py")
    return workdir


def newest(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    return checkpoint.load(workdir / stage / "checkpoints")[1]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_run_that_dies_twice_ends_bit_identical(undisturbed, tmp_path, monkeypatch):
    write, deaths = loop.MetricsLog.write, {("vae", 3), ("unet", 4)}

    def dies(self, step, metrics):
        write(self, step, metrics)
        here = (Path(self._file.name).parent.name, step)
        if here in deaths:
            deaths.remove(here)
            raise Killed

    monkeypatch.setattr(loop.MetricsLog, "write", dies)
    for _ in range(2):
        with pytest.raises(Killed):
            pretrain(tiny_config(), tmp_path, "python launch/pretrain.py")
    pretrain(tiny_config(), tmp_path, "python launch/pretrain.py")
    for stage in settings.STAGES:
        wanted, found = newest(undisturbed, stage), newest(tmp_path, stage)
        assert wanted.keys() == found.keys()
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted), stage
    for path in sorted((undisturbed / "pipeline").rglob("*")):
        if path.is_file():
            assert (
                path.read_bytes()
                == (tmp_path / "pipeline" / path.relative_to(undisturbed / "pipeline")).read_bytes()
            )


def test_pipeline_directory_is_complete_small_and_float16(undisturbed):
    directory = undisturbed / "pipeline"
    parts = load_pipeline(directory)
    assert {"vae_tiny", "clip"} <= parts.configs.keys()
    assert {leaf.dtype for leaf in parts.component("unet").params.values()} == {np.dtype(np.float16)}
    latents = np.load(undisturbed / "vae" / "latents.npz")["latents"]
    _, _, factor = vae.standardise(
        {name: np.asarray(leaf, np.float32) for name, leaf in parts.component("vae").params.items()}, latents
    )
    assert parts.component("vae").config.scaling_factor == pytest.approx(factor)
    card = (directory / "README.md").read_text(encoding="utf-8")
    for text in (
        "license: cc-by-sa-4.0",
        "All emojis designed by OpenMoji",
        "python launch/pretrain.py",
        "PSNR",
    ):
        assert text in card
    assert (directory / "grid_unet.png").is_file() and (directory / "grid_vae.png").is_file()
    assert parts.tokenizer.max_length == 24
    CLIPImageConfig.from_dict(json.loads((directory / "clip" / "preprocessor_config.json").read_text()))


def test_pipeline_draws_the_same_picture_in_diffusers_and_here(undisturbed):
    import torch
    from diffusers import AutoencoderTiny, StableDiffusionPipeline
    from transformers import CLIPModel

    directory, prompt = undisturbed / "pipeline", "a red apple on a blue background"
    noise = np.random.default_rng(1).standard_normal((1, 16, 16, 8), np.float32)
    pipe = StableDiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    ours = sbv2_jax.load(directory).draw([prompt], steps=3, guidance=3.0, sampler="ddim", noise=noise)
    assert np.abs(ours.astype(np.float32) - 255 * theirs).max() <= 2
    AutoencoderTiny.from_pretrained(directory / "vae_tiny")
    CLIPModel.from_pretrained(directory / "clip")


def test_complete_run_trains_nothing_again(undisturbed, monkeypatch):
    monkeypatch.setattr(loop, "_advance", None)
    before = (undisturbed / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    pretrain(tiny_config(), undisturbed, "python launch/pretrain.py")
    assert (undisturbed / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_run_goes_on_from_a_pipeline_whose_encoder_and_clip_stay(undisturbed, tmp_path):
    given, config = undisturbed / "pipeline", tiny_config()
    config.update(init=str(given), pictures=16)
    config.decoder.steps = config.unet.steps = 2
    pretrain(config, tmp_path, "python launch/pretrain.py")
    trained = {stage for stage in settings.STAGES if (tmp_path / stage / "checkpoints").exists()}
    assert trained == {"decoder", "unet"}
    before, after = load_pipeline(given), load_pipeline(tmp_path / "pipeline")
    for folder in ("tokenizer", "clip", "vae_tiny"):
        assert contents(given / folder) == contents(tmp_path / "pipeline" / folder)
    assert after.vae == before.vae  # its scaling factor too
    moved = {
        f"{name}.{key.split('.')[0]}"
        for name in ("vae", "unet", "text_encoder")
        for key, leaf in after.component(name).params.items()
        if not np.array_equal(leaf, before.component(name).params[key])
    }
    assert {name for name in moved if name.startswith("vae.")} == {"vae.decoder", "vae.post_quant_conv"}
    assert {"unet.mid_block", "text_encoder.text_model"} <= moved


# What is not finite, and signals


def test_steps_that_are_not_finite_change_nothing_but_the_count(tmp_path):
    def loss(params, inputs, key):
        value = jnp.sum((params["a.kernel"] - 2.0) ** 2) / inputs["divisor"]
        return value, {"loss/toy": value}

    group = training(steps=9, batch_size=1, lr=0.1, ema=0.5)
    optimizer = loop.make_optimizer(group, 0.2, 1.0)
    step = jax.jit(loop.make_step(loss, optimizer, 0.5, 0))
    params = {"a.kernel": jnp.ones((2, 2))}
    state = loop.StageState(
        step=jnp.zeros((), jnp.int32), params=params, opt=optimizer.init(params), ema=params
    )
    after, metrics = step(state, {"divisor": jnp.float32(0)})
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss/toy"]) and after.step == 1
    before, left = jax.tree.leaves(state), jax.tree.leaves(after)
    assert sum(not np.array_equal(a, b) for a, b in zip(before, left, strict=True)) == 1
    after, metrics = step(after, {"divisor": jnp.float32(1)})
    assert metrics["skipped"] == 0 and after.step == 2 and (after.params["a.kernel"] > 1).all()
    assert (after.ema["a.kernel"] > 1).all()


def test_a_stage_that_has_diverged_ends_and_keeps_its_checkpoints(tmp_path):
    group = training(steps=60, batch_size=1, lr=0.1, ema=0.5, checkpoint_every=5)
    hopeless = loop.Stage(
        name="toy",
        loss=lambda params, inputs, key: (jnp.sum(params["a.kernel"]) / inputs["zero"], {}),
        init=lambda: {"a.kernel": np.ones((2, 2), np.float32)},
        inputs={"zero": np.zeros((), np.float32)},
        settings=group,
        preview=lambda params: None,
        fingerprint="toy",
    )
    shared = loop.Shared(workdir=tmp_path, seed=0, cooldown=0.2, clip_norm=1.0, log_every=3, keep=3)
    with pytest.raises(InputError, match="not finite in 20 steps in a row, up to step 20: .*toy"):
        loop.train(hopeless, shared)
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 21] and lines[0]["skipped"] == 1
    assert checkpoint.load(tmp_path / "toy" / "checkpoints")[0] == 20


def started(workdir: Path, *flags: str) -> Forked:
    command = ["launch/pretrain.py", "--config=configs/openmoji_teacher.py:runlocal"]
    return forks().start([*command, f"--workdir={workdir}", *flags])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_it_and_says_so(tmp_path, number):
    endless = [
        "--config.vae.steps=100000",
        "--config.vae.checkpoint_every=100000",
        "--config.vae.widths=(8,8)",
    ]
    process, log = started(tmp_path, *endless), tmp_path / "vae" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert process.returncode == EXIT_PREEMPTED, error
    assert f"stopped after step {last} of vae, which is saved" in error.splitlines()[-1]
    assert checkpoint.load(tmp_path / "vae" / "checkpoints")[0] == last
    assert not (tmp_path / "vae_tiny").exists() and not (tmp_path / "pipeline").exists()


def test_a_signal_while_the_world_is_drawn_ends_at_once(tmp_path):
    process = started(tmp_path, "--config.pictures=100000")
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("world/open_moji/pretraining/*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == EXIT_PREEMPTED and "Traceback" not in error
    # The line is another thread's: the bar of TFDS may move once more after it.
    assert "stopped by SIGINT beside the steps: nothing is lost" in error
