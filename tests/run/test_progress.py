"""The grid of a run's progress: the same pictures, however many are drawn at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import write_world

from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.run import painter, progress
from sbv2_jax.run.arrays import load_frozen, load_state
from sbv2_jax.run.compilation import lay_out
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config

pytestmark = pytest.mark.slow

PROMPTS = ("a red apple", "a dog", "red dog", "an apple", "apple")


def picture(ids, noise):
    """What stands for a drawn picture: it tells from which prompt and which noise it came."""
    return jax.nn.sigmoid(noise[..., :3]) * (ids.sum(1) % 7 / 7)[:, None, None, None]


@pytest.mark.parametrize(("at_a_time", "calls"), [(64 * 64, 5), (8 * 8, 1), (2 * 8 * 8, 2)])
def test_a_device_draws_no_more_at_a_time_than_fits(tmp_path, monkeypatch, at_a_time, calls):
    """Latents of 8 x 8: all five, one after the other, or two at a time, by one program for each column."""
    world = write_world(tmp_path)
    config = default_config()
    config.update(teacher=str(world / "pipeline"), prompts=str(world / "prompts.txt"), batch_size=4)
    config.score.update(rank=2, targets=r".*\.attn[12]\.to_(q|v)")
    _, run, layout = lay_out(config, read_parts(config), jax.devices()[:1], None)
    tokenizer = run.parts.tokenizer
    traced, columns = [], {}

    def generate(generator, params, ids, null_ids, noise, *, steps=1, guidance=1.0, sampler="dpm"):
        traced.append(len(noise))
        return picture(ids, noise) * (0.5 if steps > 1 else 1.0)

    monkeypatch.setattr(painter, "generate", generate)
    monkeypatch.setattr(painter, "AT_A_TIME", at_a_time)
    monkeypatch.setattr(progress, "grid", lambda found, *_, **__: columns.update(found))
    monkeypatch.setattr(progress, "save_png", lambda *_: None)
    frozen = load_frozen(run, tokenizer.encode([""])[0], layout.frozen)
    drawn_by = painter.Painter(run, frozen, tokenizer, layout.mesh)
    progress.ProgressGrid(run, frozen, tokenizer, PROMPTS, drawn_by).draw(
        load_state(run, layout.state), tmp_path / "grid.png"
    )

    assert traced == [calls] * 3
    noise = initial_noise(config.seed, range(len(PROMPTS)), (8, 8, 4))
    want = np.asarray(picture(jnp.asarray(tokenizer.encode(PROMPTS)), noise))
    assert len({each.tobytes() for each in want}) == 5
    for name, factor in {"teacher, 25 steps": 0.5, "teacher, 1 step": 1.0, "student, 1 step": 1.0}.items():
        assert columns[name].shape == (5, 8, 8, 3)
        np.testing.assert_allclose(columns[name], 255 * factor * want, atol=0.51)
