"""The UNet of the world: v prediction on cached latents, conditioned by the CLIP's text tower, which learns on.

Of what a caption says, CLIP needs little to tell it from others, and nothing of the place of words; a UNet on its
frozen states hardly learns where things are. So both are trained (as by Rombach et al., 2022, section 3.3).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.schedule import ScheduleConfig, add_noise, make_schedule
from sbv2_jax.models.network import Network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.openmoji.pretrain.loop import Loss, Metrics, draw_rows
from sbv2_jax.openmoji.pretrain.losses import velocity_loss
from sbv2_jax.tree import Params

T = TypeVar("T")

# Stable Diffusion's noise. The network predicts v: at T - 1 an epsilon prediction would be divided by
# a_T = 0.07 to give x0, which is just what a one-step student is asked for. Samplers start at T - 1.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
_UNET, _TEXT = "unet.", "text_encoder."
SCHEDULE = make_schedule(ScheduleConfig.from_dict(SCHEDULER))


def unet_config(
    settings: ConfigDict, context_width: int, sample_size: int, latent_channels: int
) -> UNetConfig:
    """Returns the configuration: attention on all levels, but for the way down at full resolution.

    There it would cost a third of a step and see features that are not made yet.
    """
    below = len(settings.widths) - 1
    return UNetConfig(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=settings.widths,
        layers_per_block=settings.layers,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * below,
        up_block_types=("CrossAttnUpBlock2D",) * (below + 1),
        norm_num_groups=settings.groups,
        attention_head_dim=settings.heads,
        cross_attention_dim=context_width,
        use_linear_projection=True,
    )


def join(network: Mapping[str, T], text: Mapping[str, T]) -> dict[str, T]:
    """Returns the parameters of the UNet and of the text tower as one dictionary, to be trained together."""
    return {f"{_UNET}{name}": leaf for name, leaf in network.items()} | {
        f"{_TEXT}{name}": leaf for name, leaf in text.items()
    }


def split(params: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Returns the parameters of the UNet and of the text tower, from `join`."""
    unet, text = (
        {name.removeprefix(prefix): leaf for name, leaf in params.items() if name.startswith(prefix)}
        for prefix in (_UNET, _TEXT)
    )
    return unet, text


def unet_loss(network: Network, text: Network, settings: ConfigDict) -> Loss:
    """Returns the loss of joined parameters over inputs {"latents", "ids": int32 [N, phrasings, S], "null": [S]}.

    latents float32 [N, h, w, c], scaled.
    """
    size = settings.batch_size

    def loss(params: Params, inputs: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        pick, phrasing, drop, time, normal = jax.random.split(key, 5)
        rows = draw_rows(pick, size, inputs["latents"])
        ids = inputs["ids"][rows, jax.random.randint(phrasing, (size,), 0, inputs["ids"].shape[1])]
        dropped = jax.random.bernoulli(drop, settings.caption_dropout, (size, 1))
        ids = jnp.where(dropped, inputs["null"][None], ids)
        unet, tower = split(params)
        context = text.apply(tower, ids).last_hidden_state
        t = draw_times(time, size, SCHEDULE.num_timesteps)
        x0 = inputs["latents"][rows]
        x_t = add_noise(SCHEDULE, x0, jax.random.normal(normal, x0.shape), t)
        output = network.apply(unet, x_t, t, context)
        value = velocity_loss(SCHEDULE, output, x0, x_t, t, settings.snr_limit).mean()
        return value, {"loss/v": value}

    return loss


def draw_times(key: jax.Array, count: int, timesteps: int) -> jax.Array:
    """Returns timesteps int32 [count], half of a uniform density and half of one in proportion to t, spread evenly.

    Where a thing is and what it is are decided late in the noise: below it, x_t shows where it is, and a
    uniform density leaves that part of a caption a tenth of a batch to be learnt from. In proportion alone the early
    timesteps, which only samplers of many steps visit, are hardly learnt. Even spread: Kingma et al., 2021, I.1.
    """
    shared = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    # The share of timesteps below t = T x is (x + x^2) / 2; this is its inverse.
    x = (jnp.sqrt(1.0 + 8.0 * shared) - 1.0) / 2.0
    return jnp.minimum(timesteps * x, timesteps - 1).astype(jnp.int32)


def sampler(
    network: Network, text: Network, null: np.ndarray, settings: ConfigDict
) -> Callable[[Params, tuple[jax.Array, jax.Array]], jax.Array]:
    """Returns the pure function `joined parameters, (ids [N, S], noise [N, h, w, c])` -> scaled latents.

    By DDIM with the guidance and the steps of the settings; null [1, S] is the empty prompt.
    """

    def sample(params: Params, rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids, start = rows
        unet, tower = split(params)
        states = text.apply(tower, jnp.concatenate([ids, null])).last_hidden_state
        context, without = states[:-1], jnp.broadcast_to(states[-1:], states[:-1].shape)
        apply = functools.partial(network.apply, unet)
        denoise = samplers.guided(apply, context, without, settings.guidance)
        return samplers.sample(denoise, SCHEDULE, start, steps=settings.sample_steps)

    return sample


def noise(count: int, latents: np.ndarray) -> np.ndarray:
    """Returns standard normal noise, float32, for `count` latents of the shape of these; always the same."""
    return np.random.default_rng(0).standard_normal((count, *latents.shape[1:]), np.float32)
