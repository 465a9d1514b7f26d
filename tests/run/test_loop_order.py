"""What the loop does while the devices take a step: nothing that they would have to wait for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sbv2_jax.devices.sharding import make_mesh
from sbv2_jax.errors import InputError
from sbv2_jax.run.config import default_config
from sbv2_jax.run.loop import Ready, advance


class Value:
    """A number that the devices still compute: `read` notes when the host asks for it."""

    def __init__(self, value, read):
        self._value, self._read = value, read

    def __array__(self, *_, **__):
        self._read()
        return np.float32(self._value)


def saving(save):
    return SimpleNamespace(save=save, check=lambda: None)


def ready_of(events, *, first=0, latents_std=lambda step: 1.0):
    """A run whose step, data and checkpoints only note in `events` what is asked of them, and in which order."""
    number = iter(range(first + 1, 1000))

    def step(state, frozen, batch):
        of = next(number)
        events.append(f"start {of}")
        assert batch["input_ids"].tolist() == [[of], [of]], "each step has the batch of its own number"
        metrics = {"skipped": np.float32(0), "loss/vsd": np.float32(of)}
        metrics["latents/std"] = Value(latents_std(of), lambda: events.append(f"read {of}"))
        return state, metrics

    def batches():
        for of in range(first + 1, 1000):
            events.append(f"batch {of}")
            yield [str(of)] * 2

    nothing = dict.fromkeys(("frozen", "grid", "scoring", "probe"))
    return Ready(
        run=SimpleNamespace(method=SimpleNamespace(updates=1, players={}, terms=())),
        mesh=make_mesh(1, 1, 1),
        tokenizers={"input_ids": SimpleNamespace(encode=lambda texts: np.array([[int(t)] for t in texts]))},
        checkpoints=saving(lambda step, state, extra: events.append(f"save {step}")),
        first=first,
        state={"student_opt": {"count": np.int32(first)}},
        batches=batches(),
        fillings=(),
        step=step,
        **nothing,
    )


def config_of(**changes):
    config = default_config()
    config.update_from_flattened_dict({"steps": 5, "batch_size": 2, "checkpoint.every": 3} | changes)
    return config


def test_the_next_step_is_given_to_the_devices_before_the_last_one_is_read(tmp_path):
    events = []
    assert advance(config_of(), tmp_path, ready_of(events)) is False
    assert events == [
        *("batch 1", "start 1", "batch 2"),
        *("start 2", "read 1", "batch 3"),
        *("start 3", "read 2", "batch 4", "read 3", "save 3"),
        *("start 4", "batch 5"),
        *("start 5", "read 4", "read 5", "save 5"),
    ]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [json.loads(line)["loss/vsd"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_step_past_the_limit_is_not_saved_though_the_next_one_has_begun(tmp_path):
    events = []
    config = config_of(**{"limits.latents_std": 2.0})
    with pytest.raises(InputError, match=r"latents/std = 9 at step 4 .*step 4 is not saved"):
        advance(config, tmp_path, ready_of(events, latents_std=lambda step: 9.0 if step == 4 else 1.0))
    assert [event for event in events if event.startswith("save")] == ["save 3"]
    assert events[-2:] == ["start 5", "read 4"]


def test_the_time_of_a_step_is_that_of_the_devices_without_saves(tmp_path, monkeypatch):
    """A step of 2 s is given while the one before runs; a save of 10 s is none of it."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    events, done = [], [0.0]
    ready = ready_of(events)
    inner = ready.step

    def step(state, frozen, batch):
        state, metrics = inner(state, frozen, batch)
        done[0] = ends = max(clock[0], done[0]) + 2.0  # they take one after the other

        def wait():
            clock[0] = max(clock[0], ends)

        return state, metrics | {"latents/std": Value(1.0, wait)}

    def save(step, state, extra):
        clock[0] += 10.0

    ready.step, ready.checkpoints = step, saving(save)
    advance(config_of(), tmp_path, ready)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds_per_step"] for line in lines] == pytest.approx([2.0] * 5)
