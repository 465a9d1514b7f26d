"""Distils Stable Diffusion 2.1 at 512 px on a TPU v4 slice: bfloat16, weights sharded over four devices.

python launch/train.py --config=configs/tpu_v4.py --workdir=runs/sd21 \
    --config.teacher=DIR --config.student.init=DIR --config.prompts=FILE
python launch/train.py --config=configs/tpu_v4.py:lora ...               (LoRA training with the CLIP loss)
python launch/train.py --config=configs/tpu_v4.py:runlocal --workdir=/tmp/sd21    (10 steps on a laptop)
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
    config.precision = "bfloat16"
    config.remat = "block"
    config.mesh.fsdp = 4
    if "lora" in chosen:
        config.student.mode = "lora"
        config.student.lr = 1e-3
        config.clip.model = "checkpoints/clip-vit-base-patch32"
        config.clip.decoder = "checkpoints/taesd"
        config.clip.weight = 0.1
    if "runlocal" in chosen:
        shrink(config)
    return config
