"""Features that are drawn, correlated and skewed, as those of a network are."""

import numpy as np


def features(rng: np.random.Generator, count: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """Returns features [count, dim] whose covariance is another at every call."""
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return rng.gamma(2.0, size=(count, dim)) @ mixing + shift
