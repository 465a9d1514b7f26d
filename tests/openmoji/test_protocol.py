"""The world's protocol: what is compared with what, and what the classifier of facts reads."""

from types import SimpleNamespace

import numpy as np
import pytest

from sbv2_jax.evaluate.measure import Evaluation, Row
from sbv2_jax.evaluate.report import as_json
from sbv2_jax.evaluate.sources import of_pipeline
from sbv2_jax.openmoji import scenes
from sbv2_jax.openmoji.facts import Facts
from sbv2_jax.openmoji.protocol import in_training, openmoji, real_pictures
from sbv2_jax.openmoji.scenes import BACKGROUNDS, Scene


def made(rng, count, names=("apple", "dog", "key")):
    """Scenes, and features in which each fact is a few numbers of its own."""
    found, rows = [], []
    for _ in range(count):
        scene = Scene(
            rng.choice(names), rng.choice(list(BACKGROUNDS)), rng.choice(scenes.SIZES), rng.choice(scenes.POSITIONS)
        )  # fmt: skip
        parts = []
        for value, choices in (
            (scene.identity, names), (scene.background, list(BACKGROUNDS)), (scene.size, scenes.SIZES),
            (scene.position, scenes.POSITIONS),
        ):  # fmt: skip
            parts.append(np.eye(len(choices))[list(choices).index(value)])
        found.append(scene)
        rows.append(np.concatenate(parts) * 40 + rng.normal(size=sum(map(len, parts))) + 7)
    return found, np.array(rows, np.float32)


def test_facts_are_read_where_they_are_and_guessed_where_they_are_not(rng):
    train_scenes, train = made(rng, 4000)
    shown, fake = made(rng, 200)
    metric = Facts(scenes=shown, train_scenes=train_scenes)
    found = metric.measure(fake=fake, train=train)
    assert set(found) == {"drawing", "background", "size", "place"} and min(found.values()) > 0.99
    # of other pictures' features each is right as often as chance has it
    other = Facts(scenes=shown, train_scenes=train_scenes).measure(fake=rng.permutation(fake), train=train)
    for name, choices in {"drawing": 3, "background": 10, "size": len(scenes.SIZES), "place": 5}.items():
        assert other[name] == pytest.approx(1 / choices, abs=0.12), name
    shuffled = fake.copy()
    shuffled[:50] = rng.permutation(fake[:50])
    weights = np.repeat([[1, 0], [0, 1]], [50, 150], axis=0).T  # the shuffled rows, and the others
    drawings = metric.resampled(weights, fake=shuffled, train=train)["drawing"]
    assert drawings[0] < 0.6 and drawings[1] > 0.99


def test_drawings_that_training_never_shows_are_not_asked_for(rng):
    train_scenes, train = made(rng, 4000)
    shown, fake = made(rng, 50, names=("sun", "moon", "tree"))
    found = Facts(scenes=shown, train_scenes=train_scenes).measure(fake=fake, train=train)
    assert "drawing" not in found and found["background"] > 0.9


def test_one_metric_reads_the_features_of_two_networks(rng):
    """Each classifier is of the network whose features are given."""
    train_scenes, train = made(rng, 4000)
    shown, fake = made(rng, 200)
    metric = Facts(scenes=shown, train_scenes=train_scenes)
    mixing = rng.normal(size=(train.shape[1], 30)).astype(np.float32)
    for matrix in (np.eye(train.shape[1], dtype=np.float32), mixing):
        assert min(metric.measure(fake=fake @ matrix, train=train @ matrix).values()) > 0.9


def test_prompts_real_pictures_and_training_pictures_are_of_different_draws():
    protocol = openmoji(count=6, images=2)
    assert len(protocol.prompts) == 12 and protocol.of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    own = real_pictures(kind="recombined", split="test", count=6, images=2)
    assert len(own) == 12 and np.array_equal(own[2], own[3]) and not np.array_equal(own[2], own[4])
    others = [protocol.real[index].tobytes() for index in range(6)]
    assert len(protocol.real) == 6 and not {own[row].tobytes() for row in range(12)} & set(others)
    assert protocol.fingerprint() == openmoji(count=6, images=2).fingerprint()
    assert protocol.fingerprint() != openmoji(count=6, images=2, split="validation").fingerprint()
    assert {name for panel, name in protocol.decisive} == {"FD", "KID"}


def test_a_report_has_the_rule_of_the_verdict_and_the_forwards_of_a_picture(tmp_path):
    protocol = openmoji(count=6)
    pipeline = SimpleNamespace(settled=lambda steps, sampler: (steps or 2, sampler or "lcm"))
    drawn = [
        of_pipeline("m", pipeline, "", steps=steps, guidance=guidance, sampler=None, seed=0, batch_size=1)
        for steps, guidance in ((4, 2.0), (4, 1.0), (None, 1.0))
    ]
    assert [one.forwards for one in drawn] == [8, 4, 2]
    row = Row(name="m", settings={}, fingerprint="", figures={}, directory=tmp_path, rate=0.0, forwards=8)
    better = protocol.better()
    found = as_json(
        Evaluation(protocol=protocol, rows=[row], comparisons=[], references={}, better=better), "c"
    )
    assert found["sources"][0]["forwards"] == 8
    for part, ways in {
        "decisive": {"FD": "lower", "KID": "lower"},
        "guarded": {"recall": "higher", "drawing": "higher"},
    }.items():
        assert found["rule"][part] == dict.fromkeys(("efficientnet-lite0", "efficientnet-lite2"), ways)


def test_one_judge_gives_its_figures_and_no_verdict():
    alone = openmoji(count=6, judges=("efficientnet-lite2",))
    assert [panel.label for panel in alone.panels] == ["efficientnet-lite2"]
    assert not alone.decisive and not alone.guarded
    # what is drawn is the same
    assert alone.fingerprint() == openmoji(count=6).fingerprint()


def test_the_small_protocol_of_a_run_is_of_validation_prompts():
    protocol = in_training(count=5)
    assert protocol.prompts == openmoji(count=5, split="validation").prompts
    assert list(protocol.better()) == [
        ("efficientnet-lite0", name) for name in ("FD", "KID", "drawing", "background", "size", "place")
    ]
