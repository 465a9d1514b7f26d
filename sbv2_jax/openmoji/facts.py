"""What a classifier reads in pictures of the world: the drawing, the background, the size, the place."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sbv2_jax.evaluate.metrics.metric import Better, Metric, weighted_mean
from sbv2_jax.openmoji.scenes import Scene

FACTS = {"identity": "drawing", "background": "background", "size": "size", "position": "place"}
_EPOCHS, _BATCH = 30, 256


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Facts(Metric):
    """The share of pictures in which each fact of their scene is read as the prompt says it.

    One logistic regression a fact over standardised features, fitted to real training pictures, `train`, of which
    `train_scenes` tells the facts; `scenes` tells those of the generated ones. Its network is none that the method
    has seen.
    """

    name = "facts"
    reads = ("fake", "train")
    better: ClassVar[Better] = dict.fromkeys(FACTS.values(), "higher")
    scenes: Sequence[Scene]
    train_scenes: Sequence[Scene]
    _fitted: dict = dataclasses.field(default_factory=dict)
    """By the id of the features: them, so that it stays theirs, and what was fitted to them."""

    def measure(self, *, fake, train):
        return {name: float(right.mean()) for name, right in self._right(fake, train).items()}

    def resampled(self, weights, *, fake, train):
        return {
            name: weighted_mean(weights, right.astype(np.float64))
            for name, right in self._right(fake, train).items()
        }

    def _right(self, fake: np.ndarray, train: np.ndarray) -> dict[str, np.ndarray]:
        """Returns for each fact, bool [N], whether it is read in each picture as its scene says."""
        if id(train) not in self._fitted:
            heads = {fact: _fit(train, _labels(self.train_scenes, fact)) for fact in FACTS}
            self._fitted[id(train)] = train, heads
        _, heads = self._fitted[id(train)]
        found = {}
        for fact, name in FACTS.items():
            names, mean, deviation, kernel, bias = heads[fact]
            if not set(_labels(self.scenes, fact)) & set(names):
                continue  # drawings that training never shows cannot be named
            chosen = ((fake - mean) / deviation @ kernel + bias).argmax(1)
            found[name] = np.array([names[one] for one in chosen]) == np.array(_labels(self.scenes, fact))
        return found


def _labels(scenes: Sequence[Scene], fact: str) -> list[str]:
    return [getattr(scene, fact) for scene in scenes]


def _fit(features: np.ndarray, labels: Sequence[str]) -> tuple[list[str], *tuple[np.ndarray, ...]]:
    """Returns the classes and the standardisation, kernel and bias of a logistic regression."""
    names = sorted(set(labels))
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x = jnp.asarray((features - mean) / deviation, jnp.float32)
    y = jnp.array([names.index(label) for label in labels])
    optimizer = optax.adamw(2e-3, weight_decay=0.1)
    params = {"kernel": jnp.zeros((x.shape[1], len(names))), "bias": jnp.zeros(len(names))}
    batches = len(x) // _BATCH or 1

    def update(carry, rows):
        params, state = carry

        def loss(params):
            logits = x[rows] @ params["kernel"] + params["bias"][None]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def epoch(carry, key):
        order = jax.random.permutation(key, len(x))[: batches * _BATCH]
        return jax.lax.scan(update, carry, order.reshape(batches, -1))[0]

    carry = (params, optimizer.init(params))
    for key in jax.random.split(jax.random.key(0), _EPOCHS):
        carry = epoch(carry, key)
    kernel, bias = (np.asarray(carry[0][name]) for name in ("kernel", "bias"))
    return names, mean, deviation, kernel, bias
