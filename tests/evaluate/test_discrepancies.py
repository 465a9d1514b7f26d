"""KID against torchmetrics, and CMMD against its published formula, whole and on resampled rows."""

import numpy as np
import pytest
import torch
from conftest import measured
from made_features import features
from torch_metrics import poly_mmd

from sbv2_jax.evaluate.metrics import METRICS, neighbours
from sbv2_jax.evaluate.metrics.cmmd import CMMD
from sbv2_jax.evaluate.metrics.kernel import kernel_distance


def torch_mmd(real, fake):
    return float(poly_mmd(torch.from_numpy(real), torch.from_numpy(fake)))


@pytest.fixture(params=[2**26, 2000])
def blocks(request, monkeypatch):
    """All rows in one block, and a few rows in each."""
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", request.param)


def test_kernel_distance_is_that_of_torchmetrics(rng, blocks):
    real, fake = features(rng, 200, 48), features(rng, 260, 48, shift=0.1)
    subsets = [(rng.choice(200, 80, replace=False), rng.choice(260, 80, replace=False)) for _ in range(5)]

    expected = np.mean([torch_mmd(real[rows], fake[others]) for rows, others in subsets])
    error = abs(kernel_distance(real, fake, subsets) - expected) / abs(expected)
    assert measured(error) < 1e-9
    rows, others = subsets[0]
    whole = torch_mmd(real[rows], fake[others])
    assert kernel_distance(real[rows], fake[others]) == pytest.approx(whole, rel=1e-9)
    found = METRICS["kernel"].measure(real=real[rows], fake=fake[others])
    assert found == {"kernel": pytest.approx(whole, rel=1e-9)}


def test_kernel_distance_of_one_distribution_has_mean_zero(rng):
    values = [kernel_distance(*rng.normal(size=(2, 50, 8))) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert min(values) < 0  # unbiased, so it goes below


def gaussian_grams(real, fake):
    """The kernels of the paper, in units of its sigma: of both with themselves, and of one with the other."""

    def gram(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * 10.0**2))

    return gram(real, real), gram(fake, fake), gram(real, fake)


def unit(rng, count, dim, shift):
    rows = features(rng, count, dim, shift)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("make", [unit, lambda *args: 12 * features(*args)], ids=["unit", "far"])
def test_cmmd_is_that_of_the_published_formula(rng, blocks, make):
    real, fake = make(rng, 90, 24, 0.0), make(rng, 70, 24, 0.4)
    xx, yy, xy = gaussian_grams(real, fake)
    published = 1000 * (xx.mean() + yy.mean() - 2 * xy.mean())
    found = CMMD(as_published=True).measure(real=real, fake=fake)["cmmd_as_published"]
    assert measured(abs(found / published - 1)) < 1e-9

    off = [gram[~np.eye(len(gram), dtype=bool)].mean() for gram in (xx, yy)]
    unbiased = sum(off) - 2 * xy.mean()
    assert measured(abs(METRICS["cmmd"].measure(real=real, fake=fake)["cmmd"] / unbiased - 1)) < 1e-9


def test_cmmd_of_one_distribution_has_mean_zero_and_as_published_has_not(rng):
    pairs = [10 * rng.normal(size=(2, 40, 6)) for _ in range(200)]
    values = [METRICS["cmmd"].measure(real=real, fake=fake)["cmmd"] for real, fake in pairs]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    published = CMMD(as_published=True)
    assert min(published.measure(real=x, fake=y)["cmmd_as_published"] for x, y in pairs) > 0


@pytest.mark.parametrize("metric", [METRICS["kernel"], METRICS["cmmd"], CMMD(as_published=True)])
def test_a_resample_is_measured_by_weights(rng, blocks, metric):
    real, fake = features(rng, 40, 9), features(rng, 50, 9, shift=0.3)
    weights = np.concatenate(
        [np.ones((1, 50), int), rng.integers(0, 2, (3, 50)), rng.integers(0, 3, (3, 50))]
    )
    (name,) = metric.better
    found = metric.resampled(weights, real=real, fake=fake)[name]
    rows = [fake[its > 0] for its in weights[:4]]
    np.testing.assert_allclose(
        found[:4], [metric.measure(real=real, fake=its)[name] for its in rows], rtol=1e-9
    )
    if not name.endswith("as_published"):
        # Rows that are drawn twice: pairs of a row with itself are left out.
        def kernel(x, y):
            cubic = (x @ y.T / 9 + 1) ** 3
            return cubic if name == "kernel" else gaussian_grams(x, y)[2]

        gram, across = kernel(fake, fake), kernel(real, fake).mean(0)
        pairs = np.einsum("bi,ij,bj->b", weights, gram * (1 - np.eye(50)), weights)
        pairs = pairs / np.einsum("bi,ij,bj->b", weights, 1 - np.eye(50), weights)
        own = kernel(real, real)[~np.eye(40, dtype=bool)].mean()
        expected = own + pairs - 2 * weights @ across / weights.sum(1)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
