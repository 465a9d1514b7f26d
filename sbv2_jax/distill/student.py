"""The student: the network that becomes the one-step generator, and how it makes a sample."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.diffusion.samplers import one_step
from sbv2_jax.diffusion.schedule import Schedule
from sbv2_jax.distill.player import Player, Setting, with_lora
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.models.conditions import Text
from sbv2_jax.models.network import Network
from sbv2_jax.models.registry import network
from sbv2_jax.tree import Params


def rollout(
    unet: Network,
    schedule: Schedule,
    params: Params,
    z: jax.Array,
    text: Text,
    *,
    dtype: jnp.dtype,
    lora_scale: float = 1.0,
) -> jax.Array:
    """Returns the student's sample x = G(z, y), float32 [B, h, w, C]: in training as in generation.

    G is the x0 that the network predicts at the last timestep from z: for epsilon, (z - s_T eps) / a_T
    (SwiftBrush, Nguyen and Tran, 2024, section 4.2). z float32 [B, h, w, C]; `dtype` is that of the arithmetic.
    """

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        output = unet.apply(params, x.astype(dtype), t, *text, lora_scale=lora_scale)
        return output.astype(jnp.float32)

    return one_step(predict, schedule, z, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Student(Player):
    """The player that every term trains."""

    name: ClassVar[str] = "student"

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the student of a run: all weights, or a LoRA on what it starts from."""
        part, values = setting.parts["student"], config.student
        common = {
            "schedule": setting.schedules["student"],
            "optimizer": setting.optimizer(values.lr, 1),
            "part": part,
            "compute_dtype": setting.compute_dtype,
        }
        if values.mode == "full":
            return cls(network=network(part.config, execution=setting.execution), **common)
        return cls(
            network=with_lora(part, setting.execution, values.lora.targets, values.lora.rank),
            base="student",
            lora_scale=values.lora.alpha / values.lora.rank,
            seed_offset=1,
            **common,
        )

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> jax.Array:
        """Returns z, [B, h, w, C]."""
        return jax.random.normal(keys("z"), (batch_size, *latent_shape))

    def forward(
        self, params: Params, frozen: Frozen, x: jax.Array, text: Text, noise: None = None
    ) -> jax.Array:
        """Returns the samples of z = x."""
        return rollout(
            self.network,
            self.schedule,
            self.weights(params, frozen),
            x,
            text,
            dtype=self.compute_dtype,
            lora_scale=self.lora_scale,
        )
