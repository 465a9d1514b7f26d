"""FID's Inception against torch-fidelity's own file, on the same random weights, from the weights' file to features."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import relative_error
from their_judges import cleanfid, random_inception

from sbv2_jax.convert.inception import convert
from sbv2_jax.evaluate.extractors import EXTRACTORS


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Theirs, and ours by the name of the resize, which share one compiled program."""
    directory = tmp_path_factory.mktemp("inception")
    theirs = random_inception(directory / "weights.pth")
    convert(directory / "weights.pth", directory / "ours")
    names = ("inception", "inception-2015-resize")
    ours = {name: EXTRACTORS[name](directory / "ours", per_device=2) for name in names}
    assert len({one.fingerprint for one in ours.values()}) == 2
    program = ours["inception"].program
    return theirs, {name: dataclasses.replace(one, program=program) for name, one in ours.items()}


@pytest.fixture(scope="module")
def pictures():
    """Three pictures that differ in more than noise: colours and waves of their own."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:96, 0:96] / 96
    waves = [np.sin(rng.uniform(2, 40) * x + rng.uniform(2, 40) * y) for _ in range(9)]
    colours = rng.uniform(0, 255, (3, 1, 1, 3)) + 100 * np.stack(waves).reshape(3, 3, 96, 96).transpose(
        0, 2, 3, 1
    )
    return colours.clip(0, 255).astype(np.uint8)


def check(ours, features, logits):
    probabilities = torch.softmax(logits.double(), dim=-1).numpy()
    for got, want in ((ours["features"], features.numpy()), (ours["probabilities"], probabilities)):
        a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > 0.99999 and a.shape[0] == 3
        # what tells the pictures apart, too
        assert relative_error(a - a.mean(0), b - b.mean(0)) < 1e-4
        assert np.abs(b - b.mean(0)).max() > 1e-2 * np.abs(b).max()
    assert ours["probabilities"].shape[1] == 1008 and ours["features"].dtype == np.float32


@pytest.mark.slow
def test_features_and_probabilities_of_the_graph_s_own_resize(both, pictures):
    theirs, ours = both
    features, logits = theirs(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    check(ours["inception-2015-resize"](pictures), features, logits)
    assert not ours["inception"].is_published


def test_features_and_probabilities_of_clean_fid_s_resize(both, pictures, monkeypatch):
    theirs, ours = both
    resized = np.stack([cleanfid("resize").build_resizer("clean")(one) for one in pictures])
    monkeypatch.setitem(
        type(theirs).forward.__globals__,
        "interpolate_bilinear_2d_like_tensorflow1x",
        lambda *_, **__: torch.from_numpy(resized).permute(0, 3, 1, 2),
    )
    features, logits = theirs(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    check(ours["inception"](pictures), features, logits)


def test_how_many_come_at_a_time_changes_no_bit(both, pictures):
    extractor = both[1]["inception"]
    whole = extractor(pictures)
    parts = list(extractor.stream(np.split(pictures, [1, 2])))
    for name, rows in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
