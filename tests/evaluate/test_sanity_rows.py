"""Each metric orders rows whose order is known: real, copied, blurred, collapsed, of other prompts' captions."""

import numpy as np
import pytest

from sbv2_jax.evaluate.metrics import METRICS

PROMPTS, EACH, DIM = 100, 8, 24  # more pictures of a prompt than a ball has neighbours


@pytest.fixture(scope="module")
def rows():
    """The columns of each kind of model: pictures are a prompt's point and what differs between its pictures."""
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(PROMPTS), EACH)
    points = rng.gamma(2.0, size=(PROMPTS, DIM))

    def pictures(blur=1.0):
        return points[prompts] + blur * 0.6 * rng.normal(size=(PROMPTS * EACH, DIM))

    real, train = pictures(), pictures()
    mean = real.mean(0)
    captions = rng.normal(size=(DIM, DIM)) / np.sqrt(DIM)
    texts = (points - points.mean(0)) @ captions

    def similarity(fake, texts):
        seen = (fake - mean) @ captions
        return (seen * texts).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(texts, axis=1)

    def probabilities(fake):
        logits = 4 * (fake - mean)
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    shuffled = rng.permutation(PROMPTS)
    kinds = {
        "real": (pictures(), texts[prompts]),
        "copies": (train, texts[prompts]),
        "blurred": (mean + 0.6 * (pictures() - mean), texts[prompts]),
        "one picture a prompt": (pictures(blur=0.02), texts[prompts]),
        "collapsed": (real[:1] + 0.02 * rng.normal(size=real.shape), texts[prompts]),
        "noisy": (pictures(blur=3), texts[prompts]),
        "shuffled": (pictures(), texts[shuffled][prompts]),
    }
    return {
        kind: {
            "real": real,
            "train": train,
            "prompts": prompts,
            "fake": fake,
            "similarity": similarity(fake, their_texts),
            "probabilities": probabilities(fake),
        }
        for kind, (fake, their_texts) in kinds.items()
    }


# From best to worst; those in one group are alike, within a tenth of what lies between the ends.
ORDERS = {
    "frechet": (("real", "copies", "shuffled"), ("blurred",), ("collapsed",)),
    "kernel": (("real", "copies", "shuffled"), ("blurred",), ("collapsed",)),
    "cmmd": (("real", "copies", "shuffled"), ("blurred",), ("collapsed",)),
    "recall": (("real", "copies", "shuffled"), ("blurred",), ("collapsed",)),
    "coverage": (("real", "copies", "shuffled"), ("blurred",), ("collapsed",)),
    # Of what is missing neither knows: a collapsed model may have the best of both.
    "precision": (("real", "copies", "shuffled"), ("blurred",), ("noisy",)),
    "density": (("real", "copies", "shuffled"), ("blurred",), ("noisy",)),
    "clip_score": (("one picture a prompt",), ("real", "copies"), ("collapsed", "shuffled")),
    "hpsv2": (("one picture a prompt",), ("real", "copies"), ("collapsed", "shuffled")),
    "inception_score": (("real", "copies", "shuffled"), ("blurred",), ("collapsed",)),
    "diversity": (("real", "copies", "shuffled"), ("blurred",), ("one picture a prompt",)),
}
METRIC_OF = {
    "precision": "precision_recall",
    "recall": "precision_recall",
    "density": "density_coverage",
    "coverage": "density_coverage",
}


@pytest.mark.parametrize("figure", ORDERS)
def test_sanity_rows_are_in_order(rows, figure):
    metric = METRICS[METRIC_OF.get(figure, figure)]
    found = {kind: metric.measure(**metric.columns(columns))[figure] for kind, columns in rows.items()}
    sign = 1 if metric.better[figure] == "higher" else -1
    groups = [[sign * found[kind] for kind in kinds] for kinds in ORDERS[figure]]
    whole = max(groups[0]) - min(groups[-1])
    for group in groups:
        assert max(group) - min(group) < 0.1 * whole, found
    for better, worse in zip(groups, groups[1:], strict=False):
        assert min(better) > max(worse), found


def test_copies_are_told_from_real_pictures_by_nothing_but_their_distance_from_training(rows):
    metric = METRICS["nearest_train"]
    found = {kind: metric.measure(**metric.columns(columns)) for kind, columns in rows.items()}
    assert found["copies"]["nearest_train"] == 0
    real = found["real"]
    assert real["nearest_train"] == pytest.approx(real["nearest_train_of_real"], rel=0.02)
    assert real["nearest_train_low"] == pytest.approx(real["nearest_train_of_real_low"], rel=0.05)
    assert real["nearest_train_low"] > 0.5 * real["nearest_train"]
