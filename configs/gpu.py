"""Distils Stable Diffusion 2.1 at 512 px on one large GPU, or several: bfloat16, split and recomputed as need be.

python launch/train.py --config=configs/gpu.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/gpu.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/gpu.py:v1 ...                 (SwiftBrush v1: a start for any teacher)
python launch/train.py --config=configs/gpu.py:regression ...         (a start on pairs: docs/pairs.md)
python launch/train.py --config=configs/gpu.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
"""

from ml_collections import ConfigDict

from sbv2_jax.run.config import stable_diffusion_21


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` as in `stable_diffusion_21`."""
    return stable_diffusion_21(argument, {"accumulate": 4, "mesh.fsdp": -1, "remat": "auto"})
