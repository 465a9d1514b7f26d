"""Distils Stable Diffusion 2.1 at 512 px on one large GPU, or several: bfloat16, accumulated batches.

python launch/train.py --config=configs/gpu.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/gpu.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/gpu.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
"""

from ml_collections import ConfigDict

from sbv2_jax.config import shrink, stable_diffusion_21
from sbv2_jax.fields import words


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` holds "lora" (the second training), "runlocal" (shrunk), or both."""
    chosen = words(argument, "lora", "runlocal")
    config = stable_diffusion_21(lora="lora" in chosen)
    config.accumulate = 4
    config.mesh.fsdp = -1
    config.remat = "auto"
    if "runlocal" in chosen:
        shrink(config)
    return config
