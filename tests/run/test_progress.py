"""The grid of a run's progress: the same pictures, however many are drawn at a time."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import write_world

from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.run import loop, painter, progress
from sbv2_jax.run.arrays import load_frozen, load_state
from sbv2_jax.run.compilation import lay_out
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.run.kept_pictures import kept

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


def test_the_teacher_is_drawn_at_the_first_start_alone(tmp_path, monkeypatch):
    """A further start reads the same pictures, and traces no program of the teacher; of another guidance it draws."""
    world = write_world(tmp_path)
    config = default_config()
    config.update(teacher=str(world / "pipeline"), prompts=str(world / "prompts.txt"), batch_size=4)
    config.score.update(rank=2, targets=r".*\.attn[12]\.to_(q|v)")
    steps, columns = [], []

    def generate(
        generator, params, ids, null_ids, noise, *, steps_of=steps, steps=1, guidance=1.0, sampler="dpm"
    ):
        steps_of.append(steps)
        return picture(ids, noise) * (0.5 if steps > 1 else 1.0)

    monkeypatch.setattr(painter, "generate", generate)
    monkeypatch.setattr(progress, "grid", lambda found, *_, **__: columns.append(dict(found)))
    monkeypatch.setattr(progress, "save_png", lambda *_: None)
    sources = {"teacher": {"sha256": "12"}}

    def start():
        _, run, layout = lay_out(config, read_parts(config), jax.devices()[:1], None)
        frozen = load_frozen(run, run.parts.tokenizer.encode([""])[0], layout.frozen)
        drawn_by = painter.Painter(run, frozen, run.parts.tokenizer, layout.mesh)
        keep = tmp_path / "samples" / ".teacher.npz"
        grid = progress.ProgressGrid(run, frozen, run.parts.tokenizer, PROMPTS, drawn_by, keep, sources)
        grid.draw(load_state(run, layout.state), tmp_path / "grid.png")

    start()
    assert steps == [progress.TEACHER_STEPS, 1, 1]
    start()
    assert steps[3:] == [1], "the student's"
    assert list(columns[0]) == list(columns[1])
    for name in columns[0]:
        np.testing.assert_array_equal(columns[0][name], columns[1][name])
    sources["teacher"]["sha256"] = "13"
    start()
    config.vsd.guidance = 2.0
    start()
    assert steps[4:] == [progress.TEACHER_STEPS, 1, 1] * 2


def test_the_step_is_compiled_beside_the_first_pictures(tmp_path, monkeypatch):
    """Its programs are with the compiler while the grid is drawn, and waited for after it."""
    world, events = write_world(tmp_path), []
    config = default_config()
    config.update(teacher=str(world / "pipeline"), prompts=str(world / "prompts.txt"), batch_size=4, steps=2)
    config.score.update(rank=2, targets=r".*\.attn[12]\.to_(q|v)")
    config.sample.prompts = PROMPTS
    begin_step = loop.begin_step

    def begin(*arguments):
        events.append("begin")
        step, programs = begin_step(*arguments)
        wait = programs.compiled
        monkeypatch.setattr(programs, "compiled", lambda: events.append("wait") or wait())
        return step, programs

    drawn = SimpleNamespace(draw=lambda state, path: events.append("draw"))
    monkeypatch.setattr(loop, "begin_step", begin)
    monkeypatch.setattr(loop, "ProgressGrid", lambda *_: events.append("grid") or drawn)
    with contextlib.ExitStack() as held:
        ready = loop.make_ready(config, tmp_path / "run", False, held)
    assert events == ["begin", "grid", "draw", "wait"]
    assert ready.step is not None


def test_pictures_that_cannot_be_kept_are_one_line(tmp_path):
    (tmp_path / "samples").touch()
    with pytest.raises(InputError, match=f"^cannot write {tmp_path}/samples/.kept.npz: "):
        kept(tmp_path / "samples" / ".kept.npz", {"seed": 1}, lambda: {"a": np.zeros((1, 8, 8, 3), np.uint8)})


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "text", "other"])
def test_kept_pictures_are_drawn_again_where_they_are_not_what_was_kept(tmp_path, rng, damage):
    path = tmp_path / "samples" / ".kept.npz"
    drawn = []

    def draw():
        drawn.append(
            {name: rng.integers(0, 256, (3, 8, 8, 3), np.uint8) for name in ("teacher, 1 step", "b")}
        )
        return drawn[-1]

    def same(found, want):
        return list(found) == list(want) and all(np.array_equal(found[name], want[name]) for name in want)

    of = {"seed": 1, "prompts": ("a", "b")}
    assert same(kept(path, of, draw), drawn[0]) and same(kept(path, of, draw), drawn[0]) and len(drawn) == 1
    data = bytearray(path.read_bytes())
    place = data.index(drawn[0]["b"].tobytes()) + 100
    if damage == "bit":
        data[place] ^= 4
    path.write_bytes({"cut": data[:place], "empty": b"", "text": b"no archive"}.get(damage, data))
    of = {**of, "seed": 2} if damage == "other" else of
    assert same(kept(path, of, draw), drawn[1]) and same(kept(path, of, draw), drawn[1]) and len(drawn) == 2
    assert [each.name for each in path.parent.iterdir()] == [".kept.npz"]
