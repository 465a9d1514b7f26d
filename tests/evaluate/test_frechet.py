"""Fréchet distance, against torchmetrics and against distributions whose distance is known."""

import numpy as np
import pytest
import torch
from conftest import measured
from made_features import features
from torch_metrics import frechet_of_moments

from sbv2_jax.evaluate.metrics import METRICS
from sbv2_jax.evaluate.metrics.frechet import frechet_distance


def torch_frechet(real, fake):
    moments = [(torch.from_numpy(one.mean(0)), torch.from_numpy(np.cov(one.T))) for one in (real, fake)]
    return float(frechet_of_moments(*moments[0], *moments[1]))


@pytest.mark.parametrize("counts", [(300, 300), (300, 500)])
def test_frechet_distance_is_that_of_torchmetrics(rng, counts):
    real, fake = features(rng, counts[0], 48), features(rng, counts[1], 48, shift=0.1)
    expected = torch_frechet(real, fake)
    error = abs(frechet_distance(real, fake) - expected) / expected
    assert measured(error) < 1e-8
    assert METRICS["frechet"].measure(real=real, fake=fake) == {"frechet": frechet_distance(real, fake)}


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


@pytest.mark.parametrize("counts", [(90, 80), (90, 30), (25, 80), (25, 30)])
def test_a_part_of_the_pictures_has_the_distance_of_those_alone(rng, counts):
    """Either side with more and with fewer rows than features; a row may count twice."""
    real, fake = features(rng, counts[0], 40), features(rng, counts[1], 40, shift=0.2)
    weights = rng.integers(0, 3, (4, counts[1]))
    found = METRICS["frechet"].resampled(weights, real=real, fake=fake)["frechet"]
    expected = [frechet_distance(real, np.repeat(fake, its, axis=0)) for its in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
