"""The picture of a run's progress: the same prompts and noise for the teacher and, step by step, the student."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.devices import processes
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.generate.inference import to_uint8
from sbv2_jax.generate.pictures import grid, save_png
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair
from sbv2_jax.run.build import Run
from sbv2_jax.run.generators import teacher_generator
from sbv2_jax.run.kept_pictures import kept
from sbv2_jax.run.painter import Painter
from sbv2_jax.run.predictions import predicted, times
from sbv2_jax.run.sources import Source

TEACHER_STEPS = 25


class ProgressGrid:
    """Draws `samples/step_NNNNNN.png`: the teacher in many steps and in one, the student in its own, and what both see.

    The last columns are what teacher and score model take the student's noised samples for (`predictions`): where they
    agree, nothing trains the student any more.
    """

    def __init__(
        self,
        run: Run,
        frozen: Frozen,
        tokenizer: Tokenizer | TokenizerPair,
        prompts: tuple[str, ...],
        painter: Painter,
        keep: Path | None = None,
        sources: Mapping[str, Source] | None = None,
    ):
        """Draws the teacher's pictures, or reads them from the file `keep`, where those of the same `sources` are."""
        self._run, self._frozen, self._prompts, self._painter = run, frozen, prompts, painter
        count = len(prompts)
        self._ids = tokenizer.encode(prompts)
        self._noise = {"noise": painter.noise(run.seed, range(count))}
        # Another noise than the student's, whose samples remember their own.
        self._noise["added"] = painter.noise(run.seed, range(count, 2 * count))
        steps = len(run.method.student.timesteps)
        if steps > 1:
            self._noise["again"] = painter.further_noise(run.seed, range(count), steps - 1)
        self._student = f"student, {steps} step{'s' if steps > 1 else ''}"
        of = {
            "sources": sources,
            "prompts": prompts,
            "seed": run.seed,
            "guidance": run.guidance,
            "latents": run.method.latent_shape,
            "dtype": str(jnp.dtype(run.compute_dtype)),
        }
        self._columns = kept(keep, of, self._teacher) if keep else self._teacher()
        self._times = times(run)
        self._predicted = jax.jit(
            functools.partial(predicted, run, at=self._times), out_shardings=painter.whole
        )

    def _teacher(self) -> dict[str, np.ndarray]:
        run, painter, prompts = self._run, self._painter, self._prompts
        drawn = (teacher_generator(run), painter.teacher(), prompts, run.seed, range(len(prompts)))
        return {
            f"teacher, {TEACHER_STEPS} steps": painter.draw(
                *drawn, steps=TEACHER_STEPS, guidance=run.guidance
            ),
            "teacher, 1 step": painter.draw(*drawn, steps=1),
        }

    def draw(self, state: TrainState, path: Path) -> None:
        """Writes the grid of this state; the averaged student where the run keeps an average."""
        weights = self._painter.student(state)
        student = self._painter.draw_student(
            weights, self._prompts, self._run.seed, range(len(self._prompts))
        )
        columns = self._columns | {self._student: student}
        if self._times:
            columns |= self._predictions(state)
        with processes.together():
            if jax.process_index() == 0:
                side = next(iter(columns.values())).shape[1]
                save_png(path, grid(columns, self._prompts, scale=max(1, 128 // side)))

    def _predictions(self, state: TrainState) -> dict[str, np.ndarray]:
        rows = {"ids": self._ids, **self._noise}
        parts = [
            to_uint8(self._predicted(state, self._frozen, self._painter.vae, *inputs))
            for inputs in self._painter.parts(rows)
        ]
        pictures = np.concatenate(parts, axis=2)[:, :, : len(self._prompts)]
        return {
            f"{who}'s x0, t {t}": pictures[row, column]
            for column, t in enumerate(self._times)
            for row, who in enumerate(("teacher", "score"))
        }
