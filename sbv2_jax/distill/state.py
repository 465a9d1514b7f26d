"""What a training step changes (TrainState), and what it only reads (Frozen)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from sbv2_jax.tree import Params

# The parameters that no step changes, by the name of their network: passed in, never closed over, never donated,
# never checkpointed. "text_encoder" holds all text towers (`conditions.join_towers`); "null_text" is no network
# but the null condition, without a batch axis.
Frozen = dict[str, Any]


class PlayerState(NamedTuple):
    """What is trained of one player, and the state of its optimizer."""

    params: Params
    opt: optax.OptState


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a step changes and a checkpoint holds.

    `players` by name: "student", and those that follow it. `ema` averages the student, and is empty without
    averaging. `key` is the raw root key of all randomness, uint32 [2].

    The leaves are named as if each player were two fields: `student.conv_in.kernel`, `student_opt.0.count`.
    """

    step: jax.Array
    key: jax.Array
    players: dict[str, PlayerState]
    ema: Params

    @property
    def student(self) -> Params:
        """What is trained of the student."""
        return self.players["student"].params

    def tree_flatten_with_keys(self):
        named: dict[str, Any] = {"step": self.step, "key": self.key}
        for name, player in self.players.items():
            named |= {name: player.params, f"{name}_opt": player.opt}
            named.setdefault("ema", self.ema)  # beside the student, which is the first
        return [(GetAttrKey(name), child) for name, child in named.items()], tuple(self.players)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> Self:
        step, key, student, student_opt, ema, *players = children
        players = [student, student_opt, *players]
        pairs = zip(players[::2], players[1::2], strict=True)
        players = {name: PlayerState(*pair) for name, pair in zip(names, pairs, strict=True)}
        return cls(step=step, key=key, players=players, ema=ema)


def init_state(
    seed: int,
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    ema: bool,
) -> TrainState:
    """Returns the state at step 0, of what is trained of each player and their optimizers, both by name.

    The players keep the order of the optimizers: JAX sorts the names of a dictionary.
    Pure, so that `jax.eval_shape` of it gives the abstract state.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        players={
            name: PlayerState(params[name], optimizer.init(params[name]))
            for name, optimizer in optimizers.items()
        },
        # A copy: the step donates its arguments, and one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, params["student"]) if ema else {},
    )
