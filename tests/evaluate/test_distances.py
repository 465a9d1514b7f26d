"""Fréchet and kernel distance, against torchmetrics and against distributions whose distance is known."""

import numpy as np
import pytest
import torch
from conftest import measured
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from sbv2_jax.evaluate.distances import frechet_distance, kernel_distance


def features(rng, count, dim, shift=0.0):
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return rng.gamma(2.0, size=(count, dim)) @ mixing + shift


def torch_frechet(real, fake):
    moments = [(torch.from_numpy(one.mean(0)), torch.from_numpy(np.cov(one.T))) for one in (real, fake)]
    return float(_compute_fid(*moments[0], *moments[1]))


def torch_mmd(real, fake):
    return float(poly_mmd(torch.from_numpy(real), torch.from_numpy(fake)))


@pytest.mark.parametrize("counts", [(300, 300), (300, 500)])
def test_frechet_distance_is_that_of_torchmetrics(rng, counts):
    real, fake = features(rng, counts[0], 48), features(rng, counts[1], 48, shift=0.1)
    expected = torch_frechet(real, fake)
    error = abs(frechet_distance(real, fake) - expected) / expected
    assert measured(error) < 1e-8


def test_fewer_pictures_than_features_give_the_same_distance_as_the_covariances(rng):
    real, fake = features(rng, 20, 48), features(rng, 33, 48, shift=0.3)
    covariances = [np.cov(one.T) for one in (real, fake)]
    # The eigenvalues of a product of two covariances are real and not negative.
    root = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    mean = np.square(real.mean(0) - fake.mean(0)).sum()
    expected = mean + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
    error = abs(frechet_distance(real, fake) - expected) / expected
    assert measured(error) < 1e-6


def test_frechet_distance_of_shifted_and_scaled_copies_is_known(rng):
    real = rng.normal(size=(400, 16))
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(real, real + 0.5) == pytest.approx(16 * 0.25)
    variance = np.trace(np.cov(real.T))
    assert frechet_distance(real - real.mean(0), 3 * (real - real.mean(0))) == pytest.approx(4 * variance)


def test_kernel_distance_is_that_of_torchmetrics(rng):
    real, fake = features(rng, 200, 48), features(rng, 260, 48, shift=0.1)
    subsets = [(rng.choice(200, 80, replace=False), rng.choice(260, 80, replace=False)) for _ in range(5)]

    expected = np.mean([torch_mmd(real[rows], fake[others]) for rows, others in subsets])
    error = abs(kernel_distance(real, fake, subsets) - expected) / abs(expected)
    assert measured(error) < 1e-9
    rows, others = subsets[0]
    whole = torch_mmd(real[rows], fake[others])
    assert kernel_distance(real[rows], fake[others]) == pytest.approx(whole, rel=1e-9)


def test_kernel_distance_of_one_distribution_has_mean_zero(rng):
    values = [kernel_distance(*rng.normal(size=(2, 50, 8))) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert min(values) < 0  # unbiased, so it goes below


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_features_of_other_shapes_are_refused(rng, distance):
    with pytest.raises(ValueError, match=r"not \(5, 4\) and \(5, 3\)"):
        distance(rng.normal(size=(5, 4)), rng.normal(size=(5, 3)))
    with pytest.raises(ValueError, match="N and M >= 2"):
        distance(rng.normal(size=(1, 4)), rng.normal(size=(5, 4)))
