"""Pictures from prompts: a pure function, and the Pipeline that loads a directory and calls it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.convert.formats.pipeline import PipelineParts, load_pipeline, save_pipeline
from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.schedule import Schedule, ScheduleConfig, is_guided, make_schedule
from sbv2_jax.distill.random_numbers import further_noise, initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.models.conditions import Text, TextEncoder, join_towers, like, split_towers
from sbv2_jax.models.network import Network
from sbv2_jax.models.registry import network
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.tree import Params, cast


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """What is static about a text-to-image model: its networks, schedule and latent scale."""

    unet: Network
    schedule: Schedule
    text_encoder: TextEncoder
    vae: Network
    scaling_factor: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratorParams:
    """The parameters of a `Generator`; those of all text towers in one dictionary (`conditions.join_towers`)."""

    unet: Params
    text_encoder: Params
    vae: Params


def generate(
    generator: Generator,
    params: GeneratorParams,
    input_ids: jax.Array,
    null_ids: jax.Array,
    noise: jax.Array,
    again: jax.Array | None = None,
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    sampler: str | None = None,
) -> jax.Array:
    """Returns pictures, float32 [B, H, W, 3] in [0, 1], from token ids and noise [B, h, w, c].

    The arguments are those of `draw_latents`; as it, this is pure.
    """
    settings = {"steps": steps, "guidance": guidance, "sampler": sampler}
    return decode(
        generator, params.vae, draw_latents(generator, params, input_ids, null_ids, noise, again, **settings)
    )


def draw_latents(
    generator: Generator,
    params: GeneratorParams,
    input_ids: jax.Array,
    null_ids: jax.Array,
    noise: jax.Array,
    again: jax.Array | None = None,
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    sampler: str | None = None,
) -> jax.Array:
    """Returns scaled latents, float32 [B, h, w, c], from token ids and noise of that shape; no autoencoder is read.

    Token ids are [B, S], or [B, 2, S] for SDXL's two towers; the picture's size, which SDXL is told, is that of the
    noise. One step predicts x0 at the last timestep, as a distilled student does; more integrate with "ddim" or
    "dpm" (`samplers.sample`), or go on from x0 with "lcm" as a student of few steps does (`samplers.few_steps`), for
    which `again` is the noise of each further step, [B, steps - 1, h, w, c]. Without `steps` and `sampler` a student
    draws in its own, any other in one (`samplers.settled`). `null_ids` is the empty prompt, [S] or [2, S], read where
    `guidance` is over 1; 1 and less are none, as in diffusers.
    Pure: the generator and the keyword arguments are static under `jax.jit`.
    """
    dtype = params.unet["conv_in.kernel"].dtype

    def predict(x: jax.Array, t: jax.Array, text: Text) -> jax.Array:
        return generator.unet.apply(params.unet, x.astype(dtype), t, *text).astype(jnp.float32)

    encoder, latent_shape = generator.text_encoder, noise.shape[1:]
    text = cast(encoder.apply(params.text_encoder, input_ids, latent_shape), dtype)
    null = text
    if is_guided(guidance):
        null = like(cast(encoder.null(params.text_encoder, null_ids, latent_shape), dtype), text)
    denoise = samplers.guided(predict, text, null, guidance)
    schedule = generator.schedule
    steps, sampler = samplers.settled(schedule, steps, sampler)
    if sampler == "lcm" or steps == 1:
        last = (schedule.num_timesteps - 1,)
        timesteps = samplers.few_timesteps(schedule, steps) if sampler == "lcm" else last
        return samplers.few_steps(denoise, schedule, noise, again, timesteps, dtype)
    return samplers.sample(denoise, schedule, noise, steps=steps, sampler=sampler, dtype=dtype)


def decode(generator: Generator, vae: Params, latents: jax.Array) -> jax.Array:
    """Returns pictures, float32 [B, H, W, 3] in [0, 1], of scaled latents [B, h, w, c]."""
    latents = (latents / generator.scaling_factor).astype(vae["decoder.conv_in.kernel"].dtype)
    images = generator.vae.apply(vae, latents, method="decode").astype(jnp.float32)
    return jnp.clip(images * 0.5 + 0.5, 0.0, 1.0)


def to_uint8(images: jax.Array) -> np.ndarray:
    """Returns pictures in [0, 1] as uint8, rounded."""
    return np.asarray(jnp.round(images * 255.0)).astype(np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-image model that is ready to use; `sbv2_jax.load` makes one."""

    generator: Generator
    params: GeneratorParams
    tokenizer: Tokenizer | TokenizerPair
    latent_shape: tuple[int, int, int]
    parts: PipelineParts

    def __call__(self, prompts: str | Sequence[str], **settings: Any) -> Image.Image | list[Image.Image]:
        """Returns the picture of a prompt, or a list of them for a list; `settings` are those of `draw`.

        Raises InputError as `draw` does.
        """
        if isinstance(prompts, str):
            return self([prompts], **settings)[0]
        return [Image.fromarray(picture) for picture in self.draw(prompts, **settings)]

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        noise: np.ndarray | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        sampler: str | None = None,
    ) -> np.ndarray:
        """Returns one picture for each prompt, as an array, uint8 [B, H, W, 3].

        A picture depends on its prompt, the seed and its index (its place in the list, or `indices`), whatever
        the size of the batch. `noise`, float32 [B, h, w, c], replaces the seed; what "lcm" adds at further steps is of
        the seed and the index still, unless noise is [B, steps, h, w, c]. Without `steps` and `sampler` a student draws
        in its own. A `guidance` of 1 or less is none, as in diffusers.
        Raises InputError for an empty prompt, for noise of another shape, dtype or with NaN, and for a number that
        `check_numbers` refuses.
        """
        check_prompts(prompts)
        check_numbers(seed=seed, steps=steps, guidance=guidance)
        steps, sampler = self.settled(steps, sampler)
        indices = range(len(prompts)) if indices is None else indices
        shape, again = (len(prompts), *self.latent_shape), None
        if noise is None:
            noise = initial_noise(seed, indices, self.latent_shape)
        else:
            wanted = shape if noise.ndim == 4 or sampler != "lcm" else (shape[0], steps, *shape[1:])
            if noise.shape != wanted or noise.dtype != np.float32 or not np.isfinite(noise).all():
                raise InputError(
                    f"noise is {noise.dtype} {noise.shape}: finite float32 {wanted} is expected, one for each prompt"
                )
            if noise.ndim > 4:
                noise, again = noise[:, 0], noise[:, 1:]
        if sampler == "lcm" and again is None:
            again = further_noise(seed, indices, self.latent_shape, steps - 1)
        scale = float(guidance) if is_guided(guidance) else 1.0  # one program for all that are none
        images = self._generate(steps, scale, sampler)(
            self.params, self.tokenizer.encode(prompts), self.tokenizer.encode([""])[0], noise, again
        )
        return to_uint8(images)

    def settled(self, steps: int | None, sampler: str | None) -> tuple[int, str]:
        """Returns the steps and the sampler of a call that leaves them open: a student's own, as `samplers.settled`."""
        return samplers.settled(self.generator.schedule, steps, sampler)

    def save_pretrained(self, directory: str | Path, *, dtype: Any = "float32") -> None:
        """Writes the pipeline, with the weights in `params`, as a directory that diffusers loads.

        All of them are written in one `dtype`. The other files are those of the directory that it was loaded from.
        Raises InputError for a directory that
        is not empty or cannot be written, and for weights that do not fit; nothing is written then.
        """
        towers = split_towers(self.params.text_encoder, self.parts.text_encoders)
        networks = {
            name: Component(self.parts.configs[name], jax.device_get(params))
            for name, params in {"unet": self.params.unet, "vae": self.params.vae, **towers}.items()
        }
        save_pipeline(directory, base=self.parts.directory, dtype=dtype, **networks)

    @functools.cache  # noqa: B019 (as long-lived as the pipeline; a compiled program is kept for each setting)
    def _generate(self, steps: int, guidance: float, sampler: str) -> Any:
        settings = {"steps": steps, "guidance": guidance, "sampler": sampler}
        return jax.jit(functools.partial(generate, self.generator, **settings))


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises InputError that names the first prompt that is empty, and for one prompt where a list is meant."""
    if isinstance(prompts, str):
        raise InputError(f"a list of prompts is expected, not one: [{prompts!r}]")
    if not prompts:
        raise InputError("no prompt was given")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise InputError(f"prompt {number} of {len(prompts)} is empty")


def check_numbers(*, seed: int, steps: int | None, guidance: float) -> None:
    """Raises InputError for a seed that is not of 32 bits, and for steps or a guidance that are no such numbers.

    The -1 by which other programs mean any seed is refused: the same call draws the same picture.
    """
    if not _is_whole(seed) or not 0 <= seed < 2**32:
        raise InputError(
            f"seed={seed!r}: a whole number from 0 to {2**32 - 1} is expected; none stands for any"
        )
    if steps is not None and (not _is_whole(steps) or steps < 1):
        raise InputError(f"steps={steps!r}: a whole number >= 1 is expected")
    real = isinstance(guidance, int | float | np.number) and not isinstance(guidance, bool)
    if not real or not math.isfinite(guidance):
        raise InputError(f"guidance={guidance!r}: a finite number is expected; 1 or less is none")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def load(path_or_id: str | Path, *, dtype: Any = jnp.float32) -> Pipeline:
    """Loads a diffusers text-to-image directory, a hub id, or "bundled", in one dtype.

    In float16 an autoencoder of SDXL that says `force_upcast`, since it overflows there, stays in float32.
    Raises InputError for a path that is missing and for files that do not fit the networks.
    """
    return ready(load_pipeline(path_or_id, dtype=dtype), str(path_or_id), dtype=dtype)


def ready(
    parts: PipelineParts,
    name: str,
    *,
    unet: Component | None = None,
    schedule: ScheduleConfig | None = None,
    dtype: Any = jnp.float32,
) -> Pipeline:
    """Makes an opened pipeline ready to draw, with another UNet and noise schedule in place of its own if given.

    `name` is for messages. Raises InputError as `load` does.
    """
    config, vae = unet.config if unet else parts.configs["unet"], parts.configs["vae"]
    if config.sample_size is None:
        raise InputError(f"{name}: unet/config.json does not say a sample_size: write it, the latents' side")
    factor = 2 ** (len(config.block_out_channels) - 1)
    if config.sample_size % factor:
        raise InputError(
            f"{name}: unet/config.json says sample_size={config.sample_size}: a multiple of {factor} is drawn"
        )
    generator = Generator(
        unet=network(config),
        schedule=make_schedule(schedule or parts.schedule_config),
        text_encoder=TextEncoder(
            {name: network(parts.configs[name]) for name in parts.text_encoders},
            downsampling=vae.downsampling,
            zero_null=parts.zero_null,
        ),
        vae=network(vae),
        scaling_factor=vae.scaling_factor,
    )
    upcast = len(parts.text_encoders) == 2 and isinstance(vae, VAEConfig) and vae.force_upcast
    vae_dtype = jnp.float32 if upcast and jnp.dtype(dtype) == jnp.float16 else dtype
    # Not the cached parts: they would stay on the host as well.
    params = GeneratorParams(
        unet=jax.device_put(
            cast(unet.params, dtype) if unet else parts.component("unet", dtype=dtype).params
        ),
        text_encoder=join_towers(
            {name: jax.device_put(parts.component(name, dtype=dtype).params) for name in parts.text_encoders}
        ),
        vae=jax.device_put(parts.component("vae", dtype=vae_dtype).params),
    )
    shape = (config.sample_size, config.sample_size, config.in_channels)
    return Pipeline(generator, params, parts.tokenizer, shape, parts)
