"""The deviation of the latents that a student draws, looked at before it is saved."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.devices.programs import Separate
from sbv2_jax.devices.sharding import Layout
from sbv2_jax.distill.gradients import Batch, encode_prompts, fresh_samples
from sbv2_jax.distill.random_numbers import keys_of_step
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.run.batches import abstract_batch
from sbv2_jax.run.build import Run


def begin_probe(
    config: ConfigDict, run: Run, layout: Layout[jax.sharding.Mesh], programs: Separate
) -> Callable[[TrainState, Frozen, Batch], jax.Array]:
    """Begins to compile, as `begin_step`, the deviation of the samples of a state's student.

    They are of the next step's z, and of the prompts of a batch.

    A step's own `latents/std` is of the student before its update: by the time that it is too large, the student
    that made it may be saved.
    """
    method = run.method

    def probe(state: TrainState, frozen: Frozen, batch: Batch) -> jax.Array:
        keys_of, student = keys_of_step(state.key, state.step), method.student
        z = student.draw(keys_of(student.name), config.batch_size, method.latent_shape)
        z = jax.lax.with_sharding_constraint(z, layout.placement.batch)
        text = encode_prompts(method, frozen, batch["input_ids"])
        return jnp.std(fresh_samples(method, state.student, frozen, z, text))

    compiled = functools.partial(programs.run, "probe", probe, out=layout.placement.whole)
    compiled(*layout.abstract, abstract_batch(config.batch_size, run, layout.mesh))
    return compiled
