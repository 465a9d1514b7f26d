"""The weights of a run: loaded onto their shardings, or made at step 0."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.convert.formats.component import load_component
from sbv2_jax.convert.lora.files import layers_of, read_lora
from sbv2_jax.distill.state import Frozen, TrainState, init_state
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.models.conditions import join_towers
from sbv2_jax.run.build import Run
from sbv2_jax.tree import Params, require_same


def load_frozen(run: Run, null_ids: np.ndarray, placement: Frozen) -> Frozen:
    """Loads every frozen network in the compute dtype, onto the given shardings.

    `null_ids`, [S] or [2, S], is the empty prompt for the text encoder.
    """
    dtype, method = run.compute_dtype, run.method
    frozen = {
        name: place(load_component(part.files, dtype=dtype).params, placement[name])
        for name, part in run.frozen_parts.items()
    }
    towers = {
        name: load_component(part.files, dtype=dtype).params for name, part in run.parts.text_encoders.items()
    }
    frozen["text_encoder"] = place(join_towers(towers), placement["text_encoder"])
    encode_null = jax.jit(
        lambda params: method.text_encoder.null(params, jnp.asarray(null_ids), method.latent_shape),
        out_shardings=placement["null_text"],
    )
    frozen["null_text"] = encode_null(frozen["text_encoder"])
    return frozen


def read_start(run: Run, file: str) -> dict[str, np.ndarray]:
    """Reads the LoRA that the student's LoRA starts from, in float32, from a file, a folder or a hub id.

    What it adds to the weights is kept: where its strength, alpha / rank, is not the run's, the quotient goes into
    the factors `up`. Raises InputError as `read_lora` does, for variants of LoRA, and, listing every difference, for
    other layers or another rank than the run's.
    """
    shapes, scale = run.state_shapes.student, run.method.student.lora_scale
    start = read_lora(file, layers=layers_of(run.frozen_shapes["student"]))
    if not start.plain:
        raise InputError(
            f"{file} is a variant of LoRA (LoCon, LoHa, LoKr or DoRA): a student's is a plain one"
        )
    require_same(start.factors, shapes, file, "config.student.lora")
    factors = dict(start.factors)
    for module, found in start.scales.items():
        name = f"{module}.lora.up.kernel"
        factors[name] = factors[name] * np.float32(found / scale)
    return factors


def load_state(run: Run, placement: TrainState, start: dict[str, np.ndarray] | None = None) -> TrainState:
    """Makes the state at step 0: float32 masters of each player's weights, read or drawn, or of its LoRA.

    `start` holds the factors that the student's LoRA starts from, in place of new ones.
    """
    params = {}
    for name, player in run.method.players.items():
        if start and player is run.method.student:
            weights = start
        elif player.base is not None:
            weights = lora.fresh_factors(player.trained_shapes, run.seed + player.seed_offset)
        elif player.part is None:
            weights = player.network.init(run.seed + player.seed_offset)
        else:
            weights = load_component(player.part.files, dtype=jnp.float32).params
        params[name] = place(weights, placement.players[name].params)
    initialise = jax.jit(
        lambda params: init_state(run.seed, params, run.method.optimizers, run.method.ema > 0),
        out_shardings=placement,
    )
    return initialise(params)


def place(arrays: Mapping[str, np.ndarray], shardings: Mapping[str, Any]) -> Params:
    """Puts host arrays onto devices; with several processes each holds the whole array and gives its part."""

    def placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))

    return {name: placed(array, shardings[name]) for name, array in arrays.items()}
