"""Distils the bundled OpenMoji pipeline into one step: the whole method, on a laptop, without a hub.

python launch/train.py --config=configs/openmoji.py --workdir=runs/openmoji
python launch/train.py --config=configs/openmoji.py:runlocal --workdir=/tmp/openmoji    (10 steps)
"""

from ml_collections import ConfigDict

from sbv2_jax.config import default_config, shrink
from sbv2_jax.fields import words


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` may be "runlocal", which shrinks it to a minute."""
    chosen = words(argument, "runlocal")
    config = default_config()
    config.steps = 10_000
    config.student.lr = 2e-4  # the network is 200 times smaller than SD's
    config.score.lr = 1e-3
    config.score.rank = 16
    config.score.alpha = 16.0
    config.vsd.guidance = 3.0
    config.vsd.score_guidance = 1.0
    config.vsd.weighting = "dmd"
    config.optimizer.b1 = 0.0  # the gradient's direction turns as the score model follows
    if "runlocal" in chosen:
        shrink(config)
    return config
