"""Intervals cover what is known as often as they say, also where the pictures of a prompt are alike."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from drawn_prompts import differences_of, intervals_of

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.metrics.metric import Metric

# Of 300 intervals of 95%, 285 +- 3.8 cover: four deviations, and a point for prompts being few.
LEAST, MOST = 0.89, 0.995


def covered(found, truth):
    return found.low <= truth <= found.high


def test_a_mean_of_alike_pictures_is_covered_as_often_as_it_says(rng):
    """Four pictures of each of 50 prompts, whose score is mostly the prompt's."""
    hits, naive = [], []
    for seed in range(300):
        prompts = np.repeat(np.arange(50), 4)
        similarity = 0.3 + rng.normal(size=50)[prompts] + 0.3 * rng.normal(size=200)
        columns = {"similarity": similarity, "prompts": prompts}
        hits.append(
            covered(intervals_of(METRICS["clip_score"], columns, resamples=400, seed=seed)["clip_score"], 0.3)
        )
        alone = intervals_of(METRICS["clip_score"], {"similarity": similarity}, resamples=200, seed=seed)[
            "clip_score"
        ]
        naive.append(covered(alone, 0.3))
    assert LEAST < np.mean(hits) < MOST
    assert np.mean(naive) < 0.75, "without prompts the interval would be half as wide"


@pytest.mark.parametrize(("name", "draws"), [("kernel", 200), ("frechet", 60)])
def test_a_distance_is_covered_as_often_as_it_says(rng, name, draws):
    """Against one real set, as figures are; the truth is the mean over many generated sets."""
    real = rng.normal(size=(300, 3))

    def fake(generator):
        centres = generator.normal(size=(60, 3)) * [1.0, 0.7, 0.7] + [0.3, 0, 0]
        return np.repeat(centres, 2, axis=0) + 0.3 * generator.normal(size=(120, 3))

    prompts = np.repeat(np.arange(60), 2)
    truth = np.mean([METRICS[name].measure(real=real, fake=fake(rng))[name] for _ in range(600)])
    hits = []
    for seed in range(200):
        columns = {"real": real, "fake": fake(rng), "prompts": prompts}
        hits.append(covered(intervals_of(METRICS[name], columns, resamples=draws, seed=seed)[name], truth))
    assert LEAST - 0.02 < np.mean(hits) < MOST


def test_recall_and_coverage_are_covered_as_often_as_they_say(rng):
    real = rng.normal(size=(150, 2))
    metrics = {"recall": METRICS["precision_recall"], "coverage": METRICS["density_coverage"]}
    for name, metric in metrics.items():
        truth = np.mean([metric.measure(real=real, fake=rng.normal(size=(100, 2)))[name] for _ in range(200)])
        hits = []
        for seed in range(100):
            columns = {"real": real, "fake": rng.normal(size=(100, 2))}
            hits.append(covered(intervals_of(metric, columns, resamples=60, seed=seed)[name], truth))
        assert np.mean(hits) > 0.85, name


def test_a_difference_on_the_same_prompts_is_narrower_than_either_figure(rng):
    prompts = np.repeat(np.arange(80), 2)
    hard = 2 * rng.normal(size=80)[prompts]
    ours = {"similarity": hard + 0.1 * rng.normal(size=160) + 0.2, "prompts": prompts}
    # The same prompts, in another order and with another number of pictures.
    order = rng.permutation(160)[:150]
    order = np.concatenate([order, np.arange(160)])
    theirs = {"similarity": (hard + 0.1 * rng.normal(size=160))[order], "prompts": prompts[order]}
    found = differences_of(METRICS["clip_score"], ours, {**theirs})["clip_score"]
    alone = intervals_of(METRICS["clip_score"], ours)["clip_score"]
    assert found.value == pytest.approx(ours["similarity"].mean() - theirs["similarity"].mean())
    assert found.high - found.low < 0.5 * (alone.high - alone.low)

    same = {"similarity": (hard + 0.1 * rng.normal(size=160)), "prompts": prompts}
    paired = differences_of(METRICS["clip_score"], ours, same)["clip_score"]
    assert 0 < paired.low < 0.2 < paired.high < 0.3
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_has_intervals_around_its_figures_and_the_same_for_the_same_seed(rng, name):
    metric = METRICS[name]
    columns = {column: rng.gamma(2.0, size=(90, 6)) for column in ("real", "fake", "train")}
    columns |= {"probabilities": rng.dirichlet(np.ones(5), size=90), "similarity": rng.normal(size=90)}
    columns |= {"prompts": np.repeat(np.arange(45), 2)[rng.permutation(90)]}
    found = intervals_of(metric, columns, resamples=80, seed=3)
    assert {key: one.value for key, one in found.items()} == metric.measure(**metric.columns(columns))
    assert found.keys() == metric.better.keys()
    bounded = {key: one for key, one in found.items() if one.low is not None}
    assert bounded, "some figure has an interval"
    assert all(one.low < one.value < one.high for one in bounded.values())
    assert intervals_of(metric, columns, resamples=80, seed=3) == found
    assert intervals_of(metric, columns, resamples=80, seed=4) != found
    other = {**columns, "fake": columns["fake"] + 0.5, "similarity": columns["similarity"] - 0.5}
    other["probabilities"] = columns["probabilities"][::-1]
    difference = differences_of(metric, columns, other, resamples=80)
    theirs = metric.measure(**metric.columns(other))
    for key, one in difference.items():
        assert one.value == pytest.approx(found[key].value - theirs[key])
    nothing = differences_of(metric, columns, columns, resamples=20)
    assert all(one.value == 0 and one.low in (0, None) for one in nothing.values())


class Spread(Metric):
    """A metric of somebody's own, which knows no quicker way."""

    name = "spread"
    reads = ("fake", "prompts")
    better: ClassVar = {"spread": "higher"}

    def measure(self, *, fake, prompts):
        assert len(fake) == len(prompts)
        return {"spread": float(fake.std())}


def test_a_metric_without_a_quicker_way_is_measured_on_repeated_rows(rng):
    fake, prompts = rng.normal(size=(60, 2)), np.repeat(np.arange(30), 2)
    weights = rng.integers(0, 3, (4, 60))
    found = Spread().resampled(weights, fake=fake, prompts=prompts)["spread"]
    np.testing.assert_allclose(found, [np.repeat(fake, its, axis=0).std() for its in weights])
    interval = intervals_of(Spread(), {"fake": fake, "prompts": prompts, "real": fake}, resamples=50)[
        "spread"
    ]
    assert interval.low < interval.value < interval.high


def test_few_prompts_have_no_interval(rng):
    columns = {"real": rng.normal(size=(50, 3)), "fake": rng.normal(size=(57, 3))}
    few = intervals_of(METRICS["kernel"], {**columns, "prompts": np.repeat(np.arange(19), 3)})["kernel"]
    assert few.low is few.high is None and few.value == METRICS["kernel"].measure(**columns)["kernel"]
    enough = intervals_of(METRICS["precision_recall"], {**columns, "prompts": np.arange(57)}, resamples=20)
    assert enough["recall"].low is not None
    prompts = np.concatenate([[0], np.arange(56)])
    alone = intervals_of(METRICS["diversity"], {**columns, "prompts": prompts})["diversity"]
    assert alone.value > 0 and alone.low is None, "one prompt has two pictures"
    metric = dataclasses.replace(METRICS["precision_recall"], k=40)
    assert intervals_of(metric, columns)["recall"].low is None, "half of 57 have no 40 neighbours"


def test_what_cannot_be_measured_or_compared_is_refused(rng):
    columns = {"real": rng.normal(size=(50, 3)), "fake": rng.normal(size=(40, 3)), "prompts": np.arange(40)}
    metric = METRICS["kernel"]
    with pytest.raises(InputError, match="'nearest_train' needs train, which"):
        intervals_of(METRICS["nearest_train"], columns)
    with pytest.raises(InputError, match="prompts must be one for each of 40 pictures"):
        intervals_of(metric, {**columns, "prompts": np.arange(39)})
    with pytest.raises(InputError, match="these have 40 and 40, of which 38 are the same"):
        differences_of(metric, columns, {**columns, "prompts": np.arange(2, 42)})
    more = {"fake": rng.normal(size=(80, 3)), "prompts": np.tile(np.arange(40), 2)}
    with pytest.raises(InputError, match="frechet depends on the number of pictures.* not at 40 and 80"):
        differences_of(METRICS["frechet"], columns, {**columns, **more})
    assert differences_of(metric, columns, {**columns, **more}, resamples=20)["kernel"].low is not None
    columns["fake"][[3, 8], 1] = np.nan
    with pytest.raises(InputError, match="fake has numbers that are not finite in 2 of 40 rows: 3, 8"):
        intervals_of(metric, columns)


@pytest.mark.parametrize("name", ["frechet", "kernel", "cmmd", "precision_recall", "density_coverage"])
def test_features_of_other_shapes_are_refused(rng, name):
    with pytest.raises(InputError, match=r"not \(15, 4\) and \(15, 3\)"):
        METRICS[name].measure(real=rng.normal(size=(15, 4)), fake=rng.normal(size=(15, 3)))
    with pytest.raises(InputError, match="rows at least, not"):
        METRICS[name].measure(real=rng.normal(size=(1, 4)), fake=rng.normal(size=(15, 4)))
