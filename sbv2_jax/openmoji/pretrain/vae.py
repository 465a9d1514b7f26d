"""The autoencoder of the world, the tiny one in its latent space, and the latents that the UNet learns."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.models.network import Network
from sbv2_jax.models.tiny_vae import TinyVAEConfig
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.openmoji.pretrain.loop import Loss, Metrics, draw_rows, quiet_branches
from sbv2_jax.openmoji.pretrain.losses import kl_divergence, picture_loss
from sbv2_jax.openmoji.pretrain.pictures import to_float
from sbv2_jax.tree import Params

T = TypeVar("T")


def vae_config(settings: ConfigDict, sample_size: int, scaling_factor: float = 1.0) -> VAEConfig:
    """Returns the configuration of the autoencoder; `standardise` tells the scaling factor."""
    return VAEConfig(
        latent_channels=settings.channels,
        block_out_channels=settings.widths,
        down_block_types=("DownEncoderBlock2D",) * len(settings.widths),
        up_block_types=("UpDecoderBlock2D",) * len(settings.widths),
        layers_per_block=settings.layers,
        norm_num_groups=settings.groups,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def init_vae(network: Network, seed: int) -> dict[str, np.ndarray]:
    """Returns fresh parameters whose latents have little noise, a deviation of 0.05.

    With noise as strong as the latents the encoder learns first of all to shout, and the decoder nothing.
    """
    params = quiet_branches(network.init(seed))
    mean, log_variance = np.split(params["quant_conv.bias"], 2)
    return params | {"quant_conv.bias": np.concatenate([mean, np.full_like(log_variance, -6.0)])}


def tiny_config(settings: ConfigDict, latent_channels: int) -> TinyVAEConfig:
    """Returns the configuration of the tiny autoencoder; it works on scaled latents, as TAESD does."""
    return TinyVAEConfig(
        latent_channels=latent_channels,
        encoder_block_out_channels=(settings.width,) * len(settings.encoder_blocks),
        decoder_block_out_channels=(settings.width,) * len(settings.decoder_blocks),
        num_encoder_blocks=settings.encoder_blocks,
        num_decoder_blocks=settings.decoder_blocks,
    )


def vae_loss(network: Network, settings: ConfigDict) -> Loss:
    """Returns the loss over inputs {"pictures": uint8 [N, H, W, 3]}."""

    def loss(params: Params, inputs: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        pick, noise = jax.random.split(key)
        images = to_float(inputs["pictures"][draw_rows(pick, settings.batch_size, inputs["pictures"])])
        mean, log_variance = network.apply(params, images, method="encode")
        latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(noise, mean.shape)
        decoded = network.apply(params, latents, method="decode")
        picture = picture_loss(decoded, images, settings.edges).mean()
        kl = kl_divergence(mean, log_variance).mean()
        metrics = {"loss/picture": picture, "loss/kl": kl, "latents/noise": jnp.exp(log_variance / 2).mean()}
        return picture + settings.kl * kl, metrics | {"latents/std": mean.std()}

    return loss


def decoder_of(params: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Returns the parameters of an autoencoder's decoder, and the rest."""
    mine = {name: leaf for name, leaf in params.items() if name.startswith(("decoder.", "post_quant_conv."))}
    return mine, {name: leaf for name, leaf in params.items() if name not in mine}


def decoder_loss(network: Network, settings: ConfigDict, scaling_factor: float) -> Loss:
    """Returns the loss of a decoder over inputs {"pictures", "latents": float32 [N, h, w, c], scaled, "rest"}.

    `rest` is the autoencoder without its decoder. Each picture's latents bear noise of a deviation of its own, up
    to `settings.noise`: what a UNet samples lies beside the latents of real pictures, and is decoded no worse for it.
    """

    def loss(params: Params, inputs: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        pick, level, normal = jax.random.split(key, 3)
        rows = draw_rows(pick, settings.batch_size, inputs["pictures"])
        images, latents = to_float(inputs["pictures"][rows]), inputs["latents"][rows]
        deviation = settings.noise * jax.random.uniform(level, (settings.batch_size, 1, 1, 1))
        latents = (latents + deviation * jax.random.normal(normal, latents.shape)) / scaling_factor
        decoded = network.apply({**inputs["rest"], **params}, latents, method="decode")
        picture = picture_loss(decoded, images, settings.edges).mean()
        return picture, {"loss/picture": picture}

    return loss


def tiny_loss(network: Network, settings: ConfigDict) -> Loss:
    """Returns the loss over inputs {"pictures", "latents": float32 [N, h, w, c], scaled}.

    The decoder learns the pictures, not the large decoder's rendering of them; the encoder learns the latents.
    """

    def loss(params: Params, inputs: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        rows = draw_rows(key, settings.batch_size, inputs["pictures"])
        images, latents = to_float(inputs["pictures"][rows]), inputs["latents"][rows]
        decoded = network.apply(params, latents, method="decode")
        encoded = network.apply(params, images, method="encode")
        picture = picture_loss(decoded, images, settings.edges).mean()
        latent = jnp.square(encoded - latents).mean()
        return picture + latent, {"loss/picture": picture, "loss/latent": latent}

    return loss


def standardise(
    params: dict[str, np.ndarray], latents: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Gives every latent channel mean 0 and one common deviation, inside the autoencoder's 1x1 convolutions.

    latents [N, h, w, C] are the means of pictures under these parameters. Returns the new parameters, the new
    latents of the same pictures, and the scaling factor 1 / deviation. What the autoencoder draws stays the same.
    Diffusion needs it: at T - 1 a little of x0 remains in x_T, and a channel's mean would be most of that.
    """
    channels = latents.shape[-1]
    mean, deviation = (getattr(latents.reshape(-1, channels), name)(0) for name in ("mean", "std"))
    common = float(np.sqrt(np.mean(np.square(deviation))))
    factor = common / deviation
    new = dict(params)
    # encode: (mean - m) f, and the log-variance moves by 2 log f; decode: z / f + m.
    new["quant_conv.kernel"] = params["quant_conv.kernel"] * np.concatenate([factor, np.ones(channels)])
    shift = np.concatenate([-mean * factor, 2 * np.log(factor)])
    scale = np.concatenate([factor, np.ones(channels)])
    new["quant_conv.bias"] = params["quant_conv.bias"] * scale + shift
    kernel = params["post_quant_conv.kernel"]
    new["post_quant_conv.kernel"] = kernel / factor[:, None]
    new["post_quant_conv.bias"] = params["post_quant_conv.bias"] + mean @ kernel[0, 0]
    new = {name: np.asarray(leaf, np.float32) for name, leaf in new.items()}
    return new, np.asarray((latents - mean) * factor, np.float32), 1.0 / common
