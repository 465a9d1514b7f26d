"""A run's pictures, drawn on its own mesh from weights that are there: no network is held twice."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.devices.sharding import batch_sharding, shardings
from sbv2_jax.diffusion.samplers import settled
from sbv2_jax.distill.random_numbers import further_noise, initial_noise
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.generate.inference import Generator, GeneratorParams, generate, to_uint8
from sbv2_jax.models import lora
from sbv2_jax.models.registry import network
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair
from sbv2_jax.run.arrays import place
from sbv2_jax.run.build import Run
from sbv2_jax.run.generators import student_generator
from sbv2_jax.tree import Params, cast

# So many pixels of latents a device draws at a time: one picture of 512 px, or all prompts of a small world.
AT_A_TIME = 64 * 64
_STATIC = ("generator", "steps", "guidance", "sampler")


class Painter:
    """Draws pictures with any UNet of a run, whose autoencoder it holds; `vae` is that, in the compute dtype."""

    def __init__(
        self, run: Run, frozen: Frozen, tokenizer: Tokenizer | TokenizerPair, mesh: jax.sharding.Mesh
    ):
        self._run, self._frozen, self._tokenizer, self._mesh = run, frozen, tokenizer, mesh
        self._student = student_generator(run)
        host = load_component(run.parts.vae.files, dtype=run.compute_dtype).params
        self.vae = place(host, shardings(self._student.vae.shapes, mesh))
        self._null_ids = tokenizer.encode([""])[0]
        # Every process has all pictures, whatever devices drew them.
        self.whole = NamedSharding(mesh, PartitionSpec())
        self._generate = jax.jit(generate, static_argnames=_STATIC, out_shardings=self.whole)
        self._weights = jax.jit(self._merged)

    def student(self, state: TrainState) -> Params:
        """Returns all weights of the student in the compute dtype, averaged where the run keeps an average."""
        return self._weights(state.ema or state.student, self._frozen.get("student", {}))

    def teacher(self) -> Params:
        """Returns the teacher's weights: the run's own, or read anew where no player needs them."""
        if "teacher" in self._frozen:
            return self._frozen["teacher"]
        host = load_component(self._run.parts.teacher.files, dtype=self._run.compute_dtype).params
        return place(host, shardings(network(self._run.parts.teacher.config).shapes, self._mesh))

    def draw_student(
        self, weights: Params, prompts: Sequence[str], seed: int, rows: Sequence[int]
    ) -> np.ndarray:
        """Returns the student's picture of each prompt, uint8 [B, H, W, 3]: a function of seed, row and prompt."""
        return self.draw(self._student, weights, prompts, seed, rows)

    def draw(
        self,
        generator: Generator,
        unet: Params,
        prompts: Sequence[str],
        seed: int,
        rows: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> np.ndarray:
        """Returns the picture of each prompt from the noise of its row, uint8 [B, H, W, 3], in every process.

        Without `steps` a student draws in its own.
        """
        steps, sampler = settled(generator.schedule, steps, None)
        params = GeneratorParams(unet=unet, text_encoder=self._frozen["text_encoder"], vae=self.vae)
        columns = {"ids": self._tokenizer.encode(prompts), "noise": self.noise(seed, rows)}
        if sampler == "lcm" and steps > 1:
            columns["again"] = self.further_noise(seed, rows, steps - 1)
        settings = {"steps": steps, "guidance": guidance, "sampler": sampler}
        pictures = [
            to_uint8(self._generate(generator, params, ids, self._null_ids, *noises, **settings))
            for ids, *noises in self.parts(columns)
        ]
        return np.concatenate(pictures)[: len(prompts)]

    def noise(self, seed: int, rows: Sequence[int]) -> np.ndarray:
        """Returns the noise of rows, float32 [B, h, w, c], on the host."""
        return np.asarray(initial_noise(seed, rows, self._run.method.latent_shape))

    def further_noise(self, seed: int, rows: Sequence[int], count: int) -> np.ndarray:
        """Returns the noise of `count` further steps of rows, float32 [B, count, h, w, c], on the host."""
        return np.asarray(further_noise(seed, rows, self._run.method.latent_shape, count))

    def parts(self, rows: Mapping[str, np.ndarray]) -> Iterator[tuple[jax.Array, ...]]:
        """Yields arrays of a row for each picture, split over the devices, as many rows as are drawn at a time."""
        count = len(next(iter(rows.values())))
        of_a_device = max(1, AT_A_TIME // self._run.method.latent_shape[0] ** 2)
        at_a_time = self._mesh.size * min(of_a_device, -(-count // self._mesh.size))
        sharding = batch_sharding(self._mesh)
        for start in range(0, count, at_a_time):
            # The last ones are filled up, so that one compiled program draws all.
            chosen = np.minimum(np.arange(start, start + at_a_time), count - 1)
            picked = {name: column[chosen] for name, column in rows.items()}
            yield tuple(place(picked, dict.fromkeys(picked, sharding)).values())

    def _merged(self, trained: Params, base: Params) -> Params:
        if not self._run.lora_student:
            return cast(trained, self._run.compute_dtype)
        return lora.merge(base, trained, self._run.method.student.lora_scale)
