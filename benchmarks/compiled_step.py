"""The training step of a configuration, compiled as a run compiles it, on a run's own batches."""

import tempfile
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sbv2_jax.data.prompts import prompt_batches
from sbv2_jax.run.arrays import load_frozen, load_state
from sbv2_jax.run.batches import next_batch
from sbv2_jax.run.compilation import compile_step
from sbv2_jax.run.loop import prepare


class CompiledStep:
    """A run without its directory: each call takes the next step, and returns when it is done."""

    def __init__(self, config: ConfigDict):
        with tempfile.TemporaryDirectory() as empty:
            run, layout, source, self.tokenizers, self._fillings, start, *_ = prepare(config, Path(empty))
        self._updates, self._mesh = run.method.updates, layout.mesh
        self._frozen = load_frozen(run, self.tokenizers["input_ids"].encode([""])[0], layout.frozen)
        self._step, self.programs = compile_step(config, run, layout)
        self._state = load_state(run, layout.state, start)
        self.batches = prompt_batches(source, config.batch_size, config.seed)
        self._number = 0

    def __call__(self) -> None:
        batch = next_batch(
            self.batches, self.tokenizers, self._mesh, self._updates, self._fillings, self._number
        )
        self._number += 1
        self._state, metrics = self._step(self._state, self._frozen, batch)
        jax.block_until_ready((self._state, metrics))
