"""Distils Stable Diffusion 2.1 at 512 px on a TPU v5e slice: bfloat16, weights sharded over eight devices.

python launch/train.py --config=configs/tpu_v5e.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/tpu_v5e.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/tpu_v5e.py:v1 ...                 (SwiftBrush v1: a start for any teacher)
python launch/train.py --config=configs/tpu_v5e.py:regression ...         (a start on pairs: docs/pairs.md)
python launch/train.py --config=configs/tpu_v5e.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
"""

from ml_collections import ConfigDict

from sbv2_jax.run.config import stable_diffusion_21


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` as in `stable_diffusion_21`."""
    return stable_diffusion_21(argument, {"mesh.fsdp": 8})
