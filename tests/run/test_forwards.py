"""The forwards of a step, against those that its program has."""

import jax
import pytest
from tiny_world import BATCH, ONE_LEVEL, UNET, make_world

from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.models.network import Network
from sbv2_jax.run.config import default_config
from sbv2_jax.run.forwards import Forwards, forwards_of_an_image

CASES = {
    "guided": ({}, (2, 6)),
    "without guidance": ({"vsd.guidance": 1.0, "vsd.score_guidance": 1.0}, (1, 4)),
    "guidance of each sample": ({"vsd.guidance": (0.5, 1.0), "vsd.score_guidance": 1.0}, (2, 5)),
    # pairs alone: the teacher was asked when they were drawn
    "regression": ({"terms": ("regression",), "pairs.path": "p", "pairs.share": 1.0}, (0, 1)),
    # further updates are traced once, however many there are
    "a fresh update": ({"vsd.score_guidance": 1.0, "score.updates_per_step": 2}, (2, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_forwards_are_those_of_the_traced_step(case, monkeypatch):
    changes, expected = CASES[case]
    world = make_world(changes, unet=UNET | ONE_LEVEL | {"block_out_channels": [8]})
    assert forwards_of_an_image(world.config) == Forwards(*expected)
    rows, apply = [], Network.apply

    def counted(self, params, *args, **kwargs):
        if self.name == world.run.method.student.network.name:
            rows.append(args[0].shape[0])
        return apply(self, params, *args, **kwargs)

    monkeypatch.setattr(Network, "apply", counted)
    jax.eval_shape(make_train_step(world.run.method), world.init(), world.frozen, world.batch)
    assert sum(rows) == BATCH * expected[1]


def test_a_student_of_several_steps_has_half_of_the_earlier_ones_in_the_mean():
    config = default_config()
    config.update_from_flattened_dict({"student.timesteps": (999, 749, 499, 249), "vsd.score_guidance": 1.0})
    assert forwards_of_an_image(config) == Forwards(2, 2.5 + 4)
