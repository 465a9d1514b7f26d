"""A player: a network that a step trains, with its optimizer and what its gradient is taken of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import Schedule
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.models import lora
from sbv2_jax.models.conditions import Text
from sbv2_jax.models.config import ModelConfig
from sbv2_jax.models.network import Network
from sbv2_jax.models.part import Part
from sbv2_jax.models.registry import build
from sbv2_jax.models.unet import Execution
from sbv2_jax.tree import Params, Shapes, cast


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the players and terms of a run are built from, beside its configuration.

    `parts` are the networks as their files describe them: "teacher", "student" (what it starts from) and those
    that terms asked for; `schedules` are those of the first two. `rate(peak, updates_per_step)` is a learning rate by
    update, and `optimizer(rate)` makes an optimizer, both with the run's settings. `players` are those that are
    built already.
    """

    parts: Mapping[str, Part[ModelConfig]]
    schedules: Mapping[str, Schedule]
    latent_shape: tuple[int, int, int]
    compute_dtype: jnp.dtype
    execution: Execution
    rate: Callable[[float, int], optax.Schedule]
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    players: Mapping[str, "Player"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Player:
    """A trained network: all of its weights, those of `part` at first, or a LoRA on the frozen network `base`.

    `updates` is how often a step updates one that follows the student: on fresh samples each time but the last,
    which is on those that the student learns from. A LoRA, and a network without a `part`, is drawn from the run's
    seed + `seed_offset`. `rate` is the optimizer's learning rate, which the metrics tell where it is given.
    """

    name: ClassVar[str]

    network: Network
    schedule: Schedule
    optimizer: optax.GradientTransformation
    rate: optax.Schedule | None = None
    part: Part[ModelConfig] | None = None
    base: str | None = None
    lora_scale: float = 1.0
    seed_offset: int = 0
    updates: int = 1
    compute_dtype: jnp.dtype = jnp.float32

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> "Player":
        """Builds the player of a run."""
        raise NotImplementedError

    @property
    def trained_shapes(self) -> Shapes:
        """The abstract parameters that are trained."""
        return self.network.shapes if self.base is None else lora.base_and_factors(self.network.shapes)[1]

    @property
    def source(self) -> Part[ModelConfig]:
        """What it starts from; raises ValueError for one that was built of a network alone."""
        if self.part is None:
            raise ValueError(f"the player {self.name!r} has no `part`")
        return self.part

    @property
    def frozen_parts(self) -> dict[str, Part[ModelConfig]]:
        """The frozen network under its LoRA, if it is one, by the name that `Frozen` has for it."""
        return {} if self.base is None else {self.base: self.source}

    def weights(self, params: Params, frozen: Frozen) -> Params:
        """Returns all parameters of the network in the compute dtype."""
        return {**(frozen[self.base] if self.base else {}), **cast(params, self.compute_dtype)}

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> Any:
        """Returns the random numbers of an update, [B, ...] each: the student's is z, [B, h, w, C]."""
        raise NotImplementedError

    def read(self, batch: Mapping[str, jax.Array], noise: Any) -> Any:
        """Returns the random numbers of a follower's update with what else it takes of the samples' batch, [B, ...].

        Fresh samples are of no batch that has more than prompts: for them there are the random numbers alone.
        """
        return noise

    def forward(self, params: Params, frozen: Frozen, x: jax.Array, text: Text, noise: Any) -> jax.Array:
        """Returns what the gradient is taken of: the student's samples of x = z, or the loss [B] on samples x.

        `noise` is what `draw` returned, as `read` has it.
        """
        raise NotImplementedError


def with_lora(part: Part[ModelConfig], execution: Execution, targets: str, rank: int) -> Network:
    """Returns the network of a component with a LoRA on every dense layer that the regular expression matches."""
    return Network(
        lambda rngs: lora.attach(build(part.config, rngs, execution=execution), targets, rank, rngs)
    )
