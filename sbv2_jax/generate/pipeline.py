"""The Pipeline: a text-to-image directory that is loaded, and draws pictures from prompts."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from sbv2_jax.convert.formats.component import Component
from sbv2_jax.convert.formats.pipeline import PipelineParts, load_pipeline, save_pipeline
from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.schedule import ScheduleConfig, is_guided, make_schedule
from sbv2_jax.distill.random_numbers import further_noise, initial_noise
from sbv2_jax.errors import InputError
from sbv2_jax.generate.inference import (
    NEGATIVE_SCALE,
    Generator,
    GeneratorParams,
    decode,
    denoised,
    encode,
    generate,
    to_uint8,
)
from sbv2_jax.generate.interpolation import between_noises, between_texts
from sbv2_jax.models import attention
from sbv2_jax.models.conditions import TextEncoder, join_towers, split_towers
from sbv2_jax.models.registry import network
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair
from sbv2_jax.models.unet import Execution, UNetConfig
from sbv2_jax.models.vae import VAEConfig
from sbv2_jax.tree import Params, cast


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-image model that is ready to use; `sbv2_jax.load` makes one."""

    generator: Generator
    params: GeneratorParams
    tokenizer: Tokenizer | TokenizerPair
    latent_shape: tuple[int, int, int]
    parts: PipelineParts
    mesh: Mesh

    def __call__(self, prompts: str | Sequence[str], **settings: Any) -> Image.Image | list[Image.Image]:
        """Returns the picture of a prompt, or a list of them for a list; `settings` are those of `draw`.

        Raises InputError as `draw` does.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        pictures = [Image.fromarray(picture) for picture in self.draw(several, **settings)]
        return pictures[0] if isinstance(prompts, str) else pictures

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        noise: np.ndarray | None = None,
        negative_prompt: str = "",
        negative_scale: float = NEGATIVE_SCALE,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        sampler: str | None = None,
        unet: Params | None = None,
    ) -> np.ndarray:
        """Returns one picture for each prompt, as an array, uint8 [B, H, W, 3].

        A picture depends on its prompt, the seed and its index (its place in the list, or `indices`), whatever
        the size of the batch. `noise`, float32 [B, h, w, c], replaces the seed; what "lcm" adds at further steps is of
        the seed and the index still, unless noise is [B, steps, h, w, c]. Without `steps` and `sampler` a student draws
        in its own. A `guidance` of 1 or less is none, as in diffusers.
        `negative_prompt` is what is not to be seen: with guidance it stands in the place of the empty prompt; without,
        as a student is drawn, attention is steered away from it by `negative_scale`. `height` and `width` are pixels;
        without them, those that the model was made for. The devices of this process share a batch that they divide.
        `unet` are weights in the place of the pipeline's own.
        Raises InputError for an empty prompt, for noise of another shape, dtype or with NaN, for a size that the
        networks do not draw, and for a number that `check_numbers` refuses.
        """
        check_prompts(prompts)
        check_numbers(seed=seed, steps=steps, guidance=guidance, negative_scale=negative_scale)
        steps, sampler = self.settled(steps, sampler)
        indices = range(len(prompts)) if indices is None else indices
        latents = self.latents_of(height, width)
        shape = (len(prompts), *latents)
        start: np.ndarray | jax.Array
        again: np.ndarray | jax.Array | None = None
        if noise is None:
            start = initial_noise(seed, indices, latents)
        else:
            wanted = shape if noise.ndim == 4 or sampler != "lcm" else (shape[0], steps, *shape[1:])
            if noise.shape != wanted or noise.dtype != np.float32 or not np.isfinite(noise).all():
                raise InputError(
                    f"noise is {noise.dtype} {noise.shape}: finite float32 {wanted} is expected, one for each prompt"
                )
            start = noise
            if noise.ndim > 4:
                start, again = noise[:, 0], noise[:, 1:]
        if sampler == "lcm" and again is None:
            again = further_noise(seed, indices, latents, steps - 1)
        tokens = self.tokenizer.encode
        negative_ids = tokens([negative_prompt] * len(prompts)) if negative_prompt.strip() else None
        # What is None is no input of the program; the strengths are, so that all of them share one.
        rows = (tokens(prompts), start, again, negative_ids)
        strengths = {
            "guidance": np.float32(guidance) if is_guided(guidance) else None,
            "negative_scale": None
            if negative_ids is None or is_guided(guidance)
            else np.float32(negative_scale),
        }
        params = self.params if unet is None else dataclasses.replace(self.params, unet=unet)
        images = self._program(steps, sampler)(
            params, *(self._batch(row) for row in rows), tokens([""])[0], strengths
        )
        return to_uint8(images)[: len(prompts)]

    def between(
        self,
        prompts: tuple[str, str],
        shares: Sequence[float],
        *,
        seeds: tuple[int, int] = (0, 0),
        noise_shares: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Returns pictures from one prompt and noise to another, uint8 [F, H, W, 3], in a student's own steps.

        `shares` are those of the second prompt, from 0 to 1, `noise_shares` those of the second seed's noise, the same
        where they are not given. Both ways are spherical (`interpolation.slerp`); at the ends they are what `draw`
        gives of the prompt and the seed. Raises InputError as `draw` does, and for a share outside 0 to 1.
        """
        check_prompts(prompts)
        noise_shares = shares if noise_shares is None else noise_shares
        for seed in seeds:
            check_numbers(seed=seed, steps=None, guidance=1.0)
        if len(shares) != len(noise_shares) or not all(0 <= share <= 1 for share in (*shares, *noise_shares)):
            raise InputError("shares: as many of the noise as of the prompt are expected, from 0 to 1")
        steps, sampler = self.settled(None, None)
        again = None
        if sampler == "lcm":
            again = further_noise(seeds[0], [0] * len(shares), self.latent_shape, steps - 1)
        ends = [initial_noise(seed, [0], self.latent_shape)[0] for seed in seeds]
        rows = (np.asarray(shares, np.float32), np.asarray(noise_shares, np.float32), again)
        images = self._way(self.params, self.tokenizer.encode(prompts), ends, *map(self._batch, rows))
        return to_uint8(images)[: len(shares)]

    def latents_of(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Returns the shape of the latents of a picture, [h, w, c], without a size the model's own.

        Raises InputError for a size in pixels that the networks do not draw.
        """
        scale = self.generator.text_encoder.downsampling
        unit = scale * 2 ** (len(self.parts.unet.block_out_channels) - 1)
        sides = list(self.latent_shape[:2])
        for place, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is None:
                continue
            if not _is_whole(pixels) or pixels < unit or pixels % unit:
                raise InputError(f"{name}={pixels!r}: a multiple of {unit} pixels is expected")
            sides[place] = pixels // scale
        return sides[0], sides[1], self.latent_shape[2]

    def _batch(self, rows: np.ndarray | jax.Array | None) -> np.ndarray | jax.Array | None:
        """Fills up a batch to one of few sizes, so that few programs draw all, and splits it over the devices."""
        if rows is None:
            return None
        count = len(rows)
        size = 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
        rows = np.concatenate([rows, np.repeat(rows[-1:], size - count, axis=0)])
        if size % self.mesh.size or self.mesh.size == 1:
            return rows
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))

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
    def _program(self, steps: int, sampler: str) -> Any:
        def draw(params, input_ids, noise, again, negative_ids, null_ids, strengths):
            given = {name: value for name, value in strengths.items() if value is not None}
            settings = {"negative_ids": negative_ids, "steps": steps, "sampler": sampler, **given}
            return generate(self.generator, params, input_ids, null_ids, noise, again, **settings)

        return jax.jit(draw)

    @functools.cached_property
    def _way(self) -> Any:
        def draw(params, input_ids, ends, shares, noise_shares, again):
            text = encode(self.generator, params, input_ids, self.latent_shape)
            first, second = (jax.tree.map(lambda leaf, end=end: leaf[end : end + 1], text) for end in (0, 1))
            text = between_texts(first, second, shares)
            noise = between_noises(ends[0], ends[1], noise_shares)
            return decode(
                self.generator, params.vae, denoised(self.generator, params, text, text, noise, again)
            )

        return jax.jit(draw)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises InputError that names the first prompt that is empty, and for one prompt where a list is meant."""
    if isinstance(prompts, str):
        raise InputError(f"a list of prompts is expected, not one: [{prompts!r}]")
    if not prompts:
        raise InputError("no prompt was given")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise InputError(f"prompt {number} of {len(prompts)} is empty")


def check_numbers(
    *, seed: int, steps: int | None, guidance: float, negative_scale: float = NEGATIVE_SCALE
) -> None:
    """Raises InputError for a seed that is not of 32 bits, and for steps or strengths that are no such numbers.

    The -1 by which other programs mean any seed is refused: the same call draws the same picture.
    """
    if not _is_whole(seed) or not 0 <= seed < 2**32:
        raise InputError(
            f"seed={seed!r}: a whole number from 0 to {2**32 - 1} is expected; none stands for any"
        )
    if steps is not None and (not _is_whole(steps) or steps < 1):
        raise InputError(f"steps={steps!r}: a whole number >= 1 is expected")
    if not _is_real(guidance):
        raise InputError(f"guidance={guidance!r}: a finite number is expected; 1 or less is none")
    if not _is_real(negative_scale) or negative_scale < 0:
        raise InputError(f"negative_scale={negative_scale!r}: a finite number >= 0 is expected")


def _is_real(value: Any) -> bool:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def open_pipeline(path_or_id: str | Path, *, dtype: Any = jnp.float32) -> Pipeline:
    """Loads a diffusers text-to-image directory, a hub id, or "bundled", in one dtype.

    In float16 an autoencoder of SDXL that says `force_upcast`, since it overflows there, stays in float32.
    Raises InputError for a path that is missing and for files that do not fit the networks.
    """
    return ready(load_pipeline(path_or_id, dtype=dtype), str(path_or_id), dtype=dtype)


def ready(
    parts: PipelineParts,
    name: str,
    *,
    unet: Component[UNetConfig] | None = None,
    schedule: ScheduleConfig | None = None,
    dtype: Any = jnp.float32,
) -> Pipeline:
    """Makes an opened pipeline ready to draw, with another UNet and noise schedule in place of its own if given.

    `name` is for messages. Raises InputError as `open_pipeline` does.
    """
    config, vae = unet.config if unet else parts.unet, parts.vae
    if config.sample_size is None:
        raise InputError(f"{name}: unet/config.json does not say a sample_size: write it, the latents' side")
    factor = 2 ** (len(config.block_out_channels) - 1)
    if config.sample_size % factor:
        raise InputError(
            f"{name}: unet/config.json says sample_size={config.sample_size}: a multiple of {factor} is drawn"
        )
    mesh = Mesh(np.array(jax.local_devices()), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    core = attention.choose(mesh, jnp.dtype(dtype))
    generator = Generator(
        unet=network(config, execution=Execution(core=core)),
        schedule=make_schedule(schedule or parts.schedule_config),
        text_encoder=TextEncoder(
            {name: network(tower) for name, tower in parts.towers.items()},
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
            cast(unet.params, dtype) if unet else parts.component("unet", dtype=dtype).params, everywhere
        ),
        text_encoder=join_towers(
            {
                name: jax.device_put(parts.component(name, dtype=dtype).params, everywhere)
                for name in parts.text_encoders
            }
        ),
        vae=jax.device_put(parts.component("vae", dtype=vae_dtype).params, everywhere),
    )
    shape = (config.sample_size, config.sample_size, config.in_channels)
    return Pipeline(generator, params, parts.tokenizer, shape, parts, mesh)
