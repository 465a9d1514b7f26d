"""The picture of a run's progress: the same prompts and noise for the teacher and, step by step, the student."""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.devices import processes
from sbv2_jax.devices.sharding import batch_sharding, shardings
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.generate.inference import Generator, GeneratorParams, generate, initial_noise, to_uint8
from sbv2_jax.generate.pictures import grid, save_png
from sbv2_jax.models import lora
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair
from sbv2_jax.run.arrays import place
from sbv2_jax.run.build import Run
from sbv2_jax.run.generators import student_generator, teacher_generator
from sbv2_jax.run.predictions import predicted, times
from sbv2_jax.tree import Params, cast

TEACHER_STEPS = 25
# So many pixels of latents a device draws at a time: one picture of 512 px, or all prompts of a small world.
AT_A_TIME = 64 * 64
_STATIC = ("generator", "steps", "guidance", "sampler")


class ProgressGrid:
    """Draws `samples/step_NNNNNN.png`: the teacher in many steps and in one, the student in one, and what both see.

    The last columns are what teacher and score model take the student's noised samples for (`predictions`): where they
    agree, nothing trains the student any more.
    """

    def __init__(
        self,
        run: Run,
        frozen: Frozen,
        tokenizer: Tokenizer | TokenizerPair,
        prompts: tuple[str, ...],
        mesh: jax.sharding.Mesh,
    ):
        self._run, self._frozen, self._prompts = run, frozen, prompts
        self._teacher, self._student = teacher_generator(run), student_generator(run)
        host = load_component(run.parts.vae.directory, dtype=run.compute_dtype).params
        self._vae = place(host, shardings(self._student.vae.shapes, mesh))
        self._ids, self._null_ids = tokenizer.encode(prompts), tokenizer.encode([""])[0]
        self._noise = np.asarray(initial_noise(run.seed, range(len(prompts)), run.method.latent_shape))
        # Another noise than the student's, whose samples remember their own.
        self._added = np.asarray(
            initial_noise(run.seed, range(len(prompts), 2 * len(prompts)), run.method.latent_shape)
        )
        self._sharding = batch_sharding(mesh)
        of_a_device = max(1, AT_A_TIME // run.method.latent_shape[0] ** 2)
        self._at_a_time = mesh.size * min(of_a_device, -(-len(prompts) // mesh.size))
        # Every process has all pictures, whatever devices drew them.
        self._generate = jax.jit(
            generate, static_argnames=_STATIC, out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._columns = {
            f"teacher, {TEACHER_STEPS} steps": self._pictures(
                self._teacher, frozen["teacher"], steps=TEACHER_STEPS, guidance=run.guidance
            ),
            "teacher, 1 step": self._pictures(self._teacher, frozen["teacher"]),
        }
        self._weights = jax.jit(functools.partial(student_weights, run))
        self._times = times(run)
        self._predicted = jax.jit(
            functools.partial(predicted, run, at=self._times),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def draw(self, state: TrainState, path: Path) -> None:
        """Writes the grid of this state; the averaged student where the run keeps an average."""
        weights = self._weights(state.ema or state.student, self._frozen.get("student", {}))
        columns = self._columns | {"student, 1 step": self._pictures(self._student, weights)}
        if self._times:
            columns |= self._predictions(state)
        with processes.together():
            if jax.process_index() == 0:
                side = next(iter(columns.values())).shape[1]
                save_png(path, grid(columns, self._prompts, scale=max(1, 128 // side)))

    def _pictures(self, generator: Generator, unet: Params, **settings: float) -> np.ndarray:
        params = GeneratorParams(unet=unet, text_encoder=self._frozen["text_encoder"], vae=self._vae)
        pictures = [
            self._generate(generator, params, ids, self._null_ids, noise, **settings)
            for ids, noise, _ in self._parts()
        ]
        return np.concatenate([to_uint8(each) for each in pictures])[: len(self._prompts)]

    def _predictions(self, state: TrainState) -> dict[str, np.ndarray]:
        parts = [
            to_uint8(self._predicted(state, self._frozen, self._vae, *inputs)) for inputs in self._parts()
        ]
        pictures = np.concatenate(parts, axis=2)[:, :, : len(self._prompts)]
        return {
            f"{who}'s x0, t {t}": pictures[row, column]
            for column, t in enumerate(self._times)
            for row, who in enumerate(("teacher", "score"))
        }

    def _parts(self) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Yields ids, noise and the noise that is added, for as many prompts as are drawn at a time."""
        count = len(self._prompts)
        for start in range(0, count, self._at_a_time):
            # The last ones are filled up, so that one compiled program draws all.
            chosen = np.minimum(np.arange(start, start + self._at_a_time), count - 1)
            rows = {"ids": self._ids[chosen], "noise": self._noise[chosen], "added": self._added[chosen]}
            yield tuple(place(rows, dict.fromkeys(rows, self._sharding)).values())


def student_weights(run: Run, trained: Params, base: Params) -> Params:
    """Returns all weights of the student in the compute dtype: trained ones, or the base with its LoRA merged."""
    if not run.lora_student:
        return cast(trained, run.compute_dtype)
    return lora.merge(base, trained, run.method.student.lora_scale)
