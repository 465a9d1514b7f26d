"""Inception score against torchmetrics, and the means of similarities as they are published."""

import numpy as np
import pytest
import torch
from conftest import measured
from drawn_prompts import intervals_of
from torch_metrics import InceptionScore as TheirScore

from sbv2_jax.errors import InputError
from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.metrics.hpsv2 import HPSv2
from sbv2_jax.evaluate.metrics.inception_score import InceptionScore


class _Given(torch.nn.Module):
    """What torchmetrics takes for a network: it returns the logits that it is given as pictures."""

    def forward(self, x):
        return x[:, :, 0, 0]


def test_inception_score_is_that_of_torchmetrics(rng, monkeypatch):
    logits = 3 * rng.normal(size=(240, 30))
    theirs = TheirScore(feature=_Given(), splits=8)
    theirs.set_dtype(torch.float64)
    # Theirs is of rows in random order; ours, as published, of rows as they come.
    monkeypatch.setattr(torch, "randperm", lambda count: torch.arange(count))
    theirs.update(torch.from_numpy(logits)[:, :, None, None].double())
    mean, deviation = (float(one) for one in theirs.compute())

    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = InceptionScore(splits=8).measure(probabilities=probabilities)
    assert measured(abs(found["inception_score"] / mean - 1)) < 1e-9
    # Theirs divides by one less.
    assert measured(abs(found["inception_score_deviation"] * np.sqrt(8 / 7) / deviation - 1)) < 1e-9


def test_inception_score_of_sure_and_equal_classes_is_their_number(rng):
    sure = np.eye(5)[np.tile(np.arange(5), 20)]
    found = METRICS["inception_score"].measure(probabilities=sure)
    assert found == {"inception_score": pytest.approx(5), "inception_score_deviation": pytest.approx(0)}
    assert METRICS["inception_score"].measure(probabilities=sure[:0:-5])["inception_score"] == pytest.approx(
        1
    )


def test_parts_are_those_of_the_published_program(rng):
    """Its parts of 107 rows: from i * 107 // 10 to (i + 1) * 107 // 10."""
    p = rng.dirichlet(np.ones(6), size=107)
    each = []
    for i in range(10):
        part = p[i * 107 // 10 : (i + 1) * 107 // 10]
        each.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), axis=1))))
    found = METRICS["inception_score"].measure(probabilities=p)
    assert found["inception_score"] == pytest.approx(np.mean(each), rel=1e-12)
    assert found["inception_score_deviation"] == pytest.approx(np.std(each), rel=1e-9)
    half = np.tile([1, 0, 1, 1], 27)[:107]
    again = METRICS["inception_score"].resampled(half[None], probabilities=p)["inception_score"]
    parts = [slice(i * 107 // 10, (i + 1) * 107 // 10) for i in range(10)]
    whole = InceptionScore(splits=1)
    kept = [whole.measure(probabilities=p[part][half[part] > 0])["inception_score"] for part in parts]
    assert again == pytest.approx([np.mean(kept)])


def test_logits_are_no_probabilities(rng):
    with pytest.raises(InputError, match="softmax"):
        METRICS["inception_score"].measure(probabilities=rng.normal(size=(20, 5)))
    with pytest.raises(InputError, match="10 rows at least"):
        METRICS["inception_score"].measure(probabilities=rng.dirichlet(np.ones(4), size=9))


def test_clip_score_is_the_raw_mean_and_hpsv2_a_hundred_times_it(rng):
    cosines = rng.normal(0.27, 0.03, size=800)
    assert METRICS["clip_score"].measure(similarity=cosines)["clip_score"] == pytest.approx(cosines.mean())
    # The published program: the mean of ten groups of 80, each times 100.
    published = np.mean([np.mean(cosines[i : i + 80]) * 100 for i in range(0, 800, 80)])
    assert METRICS["hpsv2"].measure(similarity=cosines)["hpsv2"] == pytest.approx(published, rel=1e-12)
    negative = METRICS["clip_score"].measure(similarity=-cosines)["clip_score"]
    assert negative == pytest.approx(-cosines.mean()), "not clipped at 0"


def test_hpsv2_of_each_style_is_the_mean_of_its_pictures(rng):
    cosines, styles = rng.uniform(-1, 1, 60), ["anime", "photo", "photo"] * 20
    metric = HPSv2(styles=styles)
    figures = metric.measure(similarity=cosines)
    assert figures["hpsv2, anime"] == pytest.approx(100 * cosines[::3].mean(), rel=1e-12)
    assert figures["hpsv2, photo"] == pytest.approx(100 * np.delete(cosines, np.s_[::3]).mean(), rel=1e-12)
    assert set(metric.better) == set(figures) and metric.better["hpsv2, photo"] == "higher"
    weights = rng.integers(0, 3, (4, 60))
    again = metric.resampled(weights, similarity=cosines)["hpsv2, photo"]
    for counts, value in zip(weights, again, strict=True):
        rows = [row for row in np.repeat(np.arange(60), counts) if styles[row] == "photo"]
        assert value == pytest.approx(100 * cosines[rows].mean(), rel=1e-12)
    found = intervals_of(metric, {"similarity": cosines}, resamples=200)["hpsv2, anime"]
    assert found.low < found.value < found.high
    with pytest.raises(InputError, match="60 styles for 59 pictures"):
        metric.measure(similarity=cosines[1:])
