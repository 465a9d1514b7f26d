"""Trains the OpenMoji pipeline from nothing: tokenizer, autoencoders, two CLIPs, UNet. Hours on two cores.

`further` goes on from the bundled pipeline instead: decoder, UNet and text tower are trained more.

python launch/pretrain.py --config=configs/openmoji_teacher.py --workdir=runs/teacher
python launch/pretrain.py --config=configs/openmoji_teacher.py:further --workdir=runs/teacher
python launch/pretrain.py --config=configs/openmoji_teacher.py:runlocal --workdir=/tmp/teacher    (a minute)
"""

from ml_collections import ConfigDict

from sbv2_jax.fields import words
from sbv2_jax.openmoji.pretrain.settings import default_config, shrink


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` joins by commas "further" (from the bundled pipeline) and "runlocal" (a few steps of
    tiny networks).
    """
    chosen = words(argument, "further", "runlocal")
    config = default_config()
    if "further" in chosen:
        config.init = "bundled"
        config.cooldown = 0.5
        config.decoder.steps = 1500
        config.unet.steps = 1500
    if "runlocal" in chosen:
        shrink(config)
    return config
