"""Distils the bundled OpenMoji pipeline into one step: the whole method on a laptop, without a hub.

python launch/train.py --config=configs/openmoji.py --workdir=runs/openmoji
python launch/train.py --config=configs/openmoji.py:lora --workdir=runs/openmoji-lora    (with the CLIP loss)
python launch/train.py --config=configs/openmoji.py:v1 --workdir=runs/v1                 (SwiftBrush v1)
python launch/train.py --config=configs/openmoji.py:regression --workdir=runs/start      (on pairs: docs/pairs.md)
python launch/train.py --config=configs/openmoji.py:runlocal --workdir=/tmp/openmoji     (10 steps)
"""

from ml_collections import ConfigDict

from sbv2_jax.fields import words
from sbv2_jax.openmoji import world as openmoji
from sbv2_jax.run.config import default_config, regress, shrink, swiftbrush_v1


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` joins by commas "lora" (the second training of the paper), "v1" (SwiftBrush's
    first version) and "regression" (on pairs alone), both as a start, and "runlocal".
    """
    chosen = words(argument, "lora", "v1", "regression", "runlocal")
    config = default_config()
    config.steps = 400
    config.student.lr = 4e-4  # the network is 100 times smaller than SD's
    config.score.lr = 1e-3
    config.score.rank = 32
    config.score.alpha = 32.0
    # All dense layers of the blocks: on attention's q and v alone the score model cannot follow so fast a student,
    # whose colours then grow too strong.
    config.score.targets = r".*\.(to_(q|k|v|out\.0)|net\.(0\.proj|2)|proj_(in|out)|time_emb_proj)"
    config.vsd.guidance = 1.5  # at 3 the latents' deviation is a fifth larger, and KID worse
    config.vsd.score_guidance = 1.0
    config.vsd.weighting = "dmd"
    config.optimizer.b1 = 0.0  # the gradient's direction turns as the score model follows
    config.optimizer.schedule = "cosine"  # lets the noise that updates leave on backgrounds settle
    config.ema = 0.98  # of so few steps
    config.checkpoint.every = 100
    config.sample.every = 200
    config.sample.prompts = tuple(
        prompt.caption for kind in openmoji.PROMPT_KINDS for prompt in openmoji.prompts(kind, 4, "validation")
    )
    if "lora" in chosen:
        config.steps = 300
        config.student.mode = "lora"
        config.student.lr = 1e-3
        config.student.lora.rank = 32
        config.student.lora.alpha = 32.0
        config.clip.model = "bundled"
        config.clip.weight = 1.0
        config.clip.tau = 0.85  # this CLIP gives real pictures 0.9, and the teacher's one step 0.75
    if "v1" in chosen:
        swiftbrush_v1(config)
    if "regression" in chosen:
        regress(config)
    if "runlocal" in chosen:
        shrink(config)
    return config
