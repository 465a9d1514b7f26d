"""The settings of a pre-training that takes seconds."""

from ml_collections import ConfigDict

from sbv2_jax.openmoji.pretrain import settings


def tiny_config() -> ConfigDict:
    config = settings.default_config()
    settings.shrink(config)
    config.vae.widths = (8, 8, 8)
    config.vae_tiny.update(encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
    config.unet.widths = (8,)
    return config
