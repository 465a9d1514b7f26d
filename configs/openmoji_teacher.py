"""Trains the OpenMoji pipeline from nothing: tokenizer, autoencoders, two CLIPs, UNet. Hours on two cores.

python launch/pretrain.py --config=configs/openmoji_teacher.py --workdir=runs/teacher
python launch/pretrain.py --config=configs/openmoji_teacher.py:runlocal --workdir=/tmp/teacher    (a minute)
"""

from ml_collections import ConfigDict

from sbv2_jax.fields import words
from sbv2_jax.openmoji.pretrain.settings import default_config, shrink


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` may be "runlocal", which shrinks it to a few steps of tiny networks."""
    config = default_config()
    if "runlocal" in words(argument, "runlocal"):
        shrink(config)
    return config
