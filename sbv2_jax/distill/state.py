"""What a training step changes (TrainState), and what it only reads (Frozen)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a step changes and a checkpoint holds.

    `student` is what is trained of it: all weights, or a LoRA's. `ema` averages it, and is empty without
    averaging. `score` is the LoRA on the teacher. `key` is the raw root key of all randomness, uint32 [2].
    """

    step: jax.Array
    key: jax.Array
    student: Params
    student_opt: optax.OptState
    ema: Params
    score: Params
    score_opt: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The parameters that no step changes: passed in, never closed over, never donated, never checkpointed.

    `student` holds the weights under the student's LoRA, and is empty when all weights are trained.
    `text_encoder` holds all text towers (`conditions.join`), `null_text` is the null condition without a batch
    axis. `decoder` and `clip` are empty without the CLIP loss.
    """

    teacher: Params
    student: Params
    text_encoder: Params
    null_text: Text
    decoder: Params
    clip: Params


def init_state(
    seed: int,
    student: Params,
    score: Params,
    student_optimizer: optax.GradientTransformation,
    score_optimizer: optax.GradientTransformation,
    ema: bool,
) -> TrainState:
    """Returns the state at step 0; pure, so that `jax.eval_shape` of it gives the abstract state."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        student=student,
        student_opt=student_optimizer.init(student),
        # A copy: the step donates its arguments, and one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, student) if ema else {},
        score=score,
        score_opt=score_optimizer.init(score),
    )
