"""Distils Stable Diffusion 2.1 at 512 px on 4 to 16 chips of TPU v4: bfloat16, split and recomputed as need be.

The batch of 64 is 16 images a chip on 4 chips, 8 on 8 and 4 on 16. By the estimate of memory the weights are then
split over two chips on 4, and over none on 8 and 16; blocks are computed again. More chips want more images: at one a
chip a step waits for its weights, not for arithmetic, and a chip makes half as many images (docs/scaling.md).

python launch/train.py --config=configs/tpu_v4.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/tpu_v4.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/tpu_v4.py:v1 ...                 (SwiftBrush v1: a start for any teacher)
python launch/train.py --config=configs/tpu_v4.py:regression ...         (a start on pairs: docs/pairs.md)
python launch/train.py --config=configs/tpu_v4.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
"""

from ml_collections import ConfigDict

from sbv2_jax.run.config import stable_diffusion_21


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` as in `stable_diffusion_21`."""
    return stable_diffusion_21(argument, {"mesh.fsdp": -1, "remat": "auto"})
