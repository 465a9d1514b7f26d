"""Precision, recall, density, coverage, diversity and nearest distances, against plain NumPy over all pairs."""

import tracemalloc

import numpy as np
import pytest
from conftest import measured
from made_features import features

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics import METRICS, neighbours
from sbv2_jax.evaluate.metrics.density_coverage import DensityCoverage
from sbv2_jax.evaluate.metrics.precision_recall import PrecisionRecall

SMALL, LARGE = 5000, 2**26


def all_pairs(x, y):
    return np.stack([np.square(row - y).sum(1) for row in x])


def kth_other(x, k):
    distances = all_pairs(x, x)
    return np.array([np.sort(np.delete(row, index))[k - 1] for index, row in enumerate(distances)])


def plain_precision_recall(real, fake, k):
    """How many generated rows are in some real row's ball, and real ones in some generated row's."""
    across = all_pairs(real, fake)
    precise = (across <= kth_other(real, k)[:, None]).any(0)
    recalled = (across <= kth_other(fake, k)).any(1)
    return precise.sum(), recalled.sum()


def plain_density_coverage(real, fake, k):
    """As in the published program: `<`, distances and not their squares."""
    across, radii = np.sqrt(all_pairs(real, fake)), np.sqrt(kth_other(real, k))
    return (across < radii[:, None]).sum(0).mean() / k, (across.min(1) < radii).mean()


def sets(rng, kind):
    """Real and generated features: apart, with ties, with copies of one another, far from 0, and collapsed."""
    if kind == "lattice":  # many distances are the same
        return rng.integers(0, 3, (150, 5)).astype(np.float64), rng.integers(0, 4, (130, 5)).astype(
            np.float64
        )
    real, fake = np.split(features(rng, 280, 20), [150])
    fake += 0.3
    if kind == "copies":
        fake[:60] = real[40:100]
        fake[60:80] = fake[:20]
    if kind == "far":
        real, fake = real + 1e4, fake + 1e4
        fake[:40] = real[:40]
    if kind == "collapsed":
        fake = np.repeat(real[:1] + 0.01, 130, axis=0)
    return real, fake


KINDS = ("apart", "lattice", "copies", "far", "collapsed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "size"), [(3, SMALL), (5, LARGE), (1, SMALL)])
def test_precision_and_recall_are_those_of_plain_numpy(rng, monkeypatch, kind, k, size):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", size)
    real, fake = sets(rng, kind)
    found = PrecisionRecall(k=k).measure(real=real, fake=fake)
    counts = (found["precision"] * len(fake), found["recall"] * len(real))
    assert counts == pytest.approx(plain_precision_recall(real, fake, k), abs=1e-9)
    if kind in ("apart", "copies"):
        assert 0 < found["recall"] < 1 and 0 < found["precision"] < 1, "the case must tell"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "size"), [(5, SMALL), (3, LARGE)])
def test_density_and_coverage_are_those_of_the_published_formula(rng, monkeypatch, kind, k, size):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", size)
    real, fake = sets(rng, kind)
    found = DensityCoverage(k=k).measure(real=real, fake=fake)
    assert (found["density"], found["coverage"]) == pytest.approx(
        plain_density_coverage(real, fake, k), abs=1e-12
    )


def test_a_picture_on_an_edge_is_in_the_manifold_and_in_no_ball():
    real = np.array([[0.0, 0.0], [3.0, 4.0]])
    fake = np.array([[3.0, -4.0], [100.0, 0.0], [103.0, 4.0]])
    assert PrecisionRecall(k=1).measure(real=real, fake=fake)["precision"] == pytest.approx(1 / 3)
    assert DensityCoverage(k=1).measure(real=real, fake=fake) == {"density": 0.0, "coverage": 0.0}


def test_part_of_the_pictures_has_the_figures_of_those_alone(rng, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", SMALL)
    real, fake = np.split(features(rng, 210, 6), [90])
    halves = np.stack([rng.permutation(np.arange(120) < 60) for _ in range(5)]).astype(int)
    for metric in (PrecisionRecall(k=3), PrecisionRecall(k=10), DensityCoverage(k=4)):
        found = metric.resampled(halves, real=real, fake=fake)
        alone = [metric.measure(real=real, fake=fake[half > 0]) for half in halves]
        for name in metric.better:
            np.testing.assert_allclose(found[name], [one[name] for one in alone], atol=1e-12)
            assert metric.k == 10 or len(set(found[name])) > 1


def test_the_distance_of_a_copy_from_the_training_pictures_is_zero(rng):
    train, real = features(rng, 80, 12), features(rng, 60, 12)
    fake = np.concatenate([train[:30], train[30:60] + 0.1])
    found = METRICS["nearest_train"].measure(fake=fake, train=train, real=real)
    nearest = np.sqrt(all_pairs(real, train).min(1))
    expected = {"nearest_train": np.sqrt(all_pairs(fake, train).min(1)).mean(), "nearest_train_low": 0.0}
    expected |= {"nearest_train_of_real": nearest.mean()}
    expected |= {"nearest_train_of_real_low": np.sort(nearest)[2]}  # the third of 60 is at 5%
    assert found == pytest.approx(expected, rel=1e-9)
    assert found["nearest_train_low"] == 0.0, "to the bit"
    alone = METRICS["nearest_train"].measure(fake=fake, train=train)
    assert alone == {name: found[name] for name in ("nearest_train", "nearest_train_low")}


def test_diversity_is_the_mean_distance_within_a_prompt(rng):
    fake = features(rng, 11, 7)
    prompts = np.array([5, 2, 5, 2, 9, 5, 7, 7, 7, 7, 2])  # 9 has one picture
    each = []
    for prompt in (2, 5, 7):
        rows = fake[prompts == prompt]
        each.append(np.sqrt(all_pairs(rows, rows))[np.triu_indices(len(rows), 1)].mean())
    found = METRICS["diversity"].measure(fake=fake, prompts=prompts)
    assert measured(abs(found["diversity"] / np.mean(each) - 1)) < 1e-12

    weights = np.array([1, 3, 1, 3, 4, 1, 0, 0, 0, 0, 3])[None]
    twice = METRICS["diversity"].resampled(weights, fake=fake, prompts=prompts)["diversity"]
    assert twice == pytest.approx([(3 * each[0] + each[1]) / 4])
    with pytest.raises(InputError, match="two pictures or more of some prompt"):
        METRICS["diversity"].measure(fake=fake, prompts=np.arange(11))


@pytest.mark.slow
def test_ten_thousand_against_ten_thousand_need_no_whole_matrix(rng):
    """A matrix of all distances would be 800 MB."""
    real, fake = rng.normal(size=(2, 10_000, 4))
    tracemalloc.start()
    try:
        found = METRICS["precision_recall"].measure(real=real, fake=fake)
        found |= METRICS["density_coverage"].measure(real=real, fake=fake)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500 * 2**20
    assert found["density"] == pytest.approx(1, abs=0.05) and found["precision"] > 0.9
