"""Distils Stable Diffusion 2.1 at 512 px on a TPU v5e slice: bfloat16, weights sharded over eight devices.

python launch/train.py --config=configs/tpu_v5e.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/tpu_v5e.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/tpu_v5e.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
"""

from ml_collections import ConfigDict

from sbv2_jax.config import shrink, stable_diffusion_21
from sbv2_jax.fields import words


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` holds "lora" (the second training), "runlocal" (shrunk), or both."""
    chosen = words(argument, "lora", "runlocal")
    config = stable_diffusion_21(lora="lora" in chosen)
    config.batch_size = 128  # one image a chip on 128 of them
    config.mesh.fsdp = 8
    if "runlocal" in chosen:
        shrink(config)
    return config
