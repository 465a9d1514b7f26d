"""Distils Stable Diffusion 2.1 at 512 px on one large GPU, or several: bfloat16, accumulated batches.

python launch/train.py --config=configs/gpu.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/gpu.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/gpu.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
"""

from ml_collections import ConfigDict

from sbv2_jax.config import default_config, shrink
from sbv2_jax.fields import words


def get_config(argument: str = "") -> ConfigDict:
    """Returns the run; `argument` holds "lora" (the second training), "runlocal" (shrunk), or both."""
    chosen = words(argument, "lora", "runlocal")
    config = default_config()
    config.teacher = "checkpoints/stable-diffusion-2-1-base"
    config.architecture = "sd21-base"
    config.resolution = 512
    config.student.init = "checkpoints/sd-turbo"
    config.prompts = "data/prompts.txt"
    config.batch_size = 64
    config.accumulate = 4
    config.precision = "bfloat16"
    config.remat = "block"
    if "lora" in chosen:
        config.student.mode = "lora"
        config.student.lr = 1e-3
        config.clip.model = "checkpoints/clip-vit-base-patch32"
        config.clip.decoder = "checkpoints/taesd"
        config.clip.weight = 0.1
    if "runlocal" in chosen:
        shrink(config)
    return config
