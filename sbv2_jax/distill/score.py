"""The score model: a LoRA on the teacher that follows the distribution of the student's samples."""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import Schedule, add_noise, coefficients, rounded, to_epsilon
from sbv2_jax.distill.player import Player, Setting, with_lora
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params


class ScoreNoise(NamedTuple):
    """The random numbers of an update: noise [B, h, w, C], t [B], null [B] (the prompt is dropped)."""

    noise: jax.Array
    t: jax.Array
    null: jax.Array


def score_loss(schedule: Schedule, epsilon: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns a_t^2 mean |epsilon - noise|^2, [B]: denoising, weighted as in SwiftBrush's training.

    epsilon is the score model's prediction, noise what was added, both [B, h, w, C]; t int32 [B].
    """
    a, _ = coefficients(schedule, t, epsilon, noise)
    return jnp.mean((a * (epsilon - noise)) ** 2, axis=tuple(range(1, epsilon.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Score(Player):
    """The player that learns to denoise the student's samples; `schedule` is the teacher's."""

    name: ClassVar[str] = "score"

    null_prompt_probability: float = 0.1

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the score model of a run."""
        part, values = setting.parts["teacher"], config.score
        return cls(
            network=with_lora(part, setting.execution, values.targets, values.rank),
            schedule=setting.schedules["teacher"],
            optimizer=setting.optimizer(values.lr, values.updates_per_step),
            part=part,
            base="teacher",
            lora_scale=values.alpha / values.rank,
            updates=values.updates_per_step,
            compute_dtype=setting.compute_dtype,
            null_prompt_probability=values.null_prompt_probability,
        )

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> ScoreNoise:
        """Returns the random numbers of all updates of a step, with a leading axis of `updates`."""
        shape = (self.updates, batch_size)
        return ScoreNoise(
            noise=jax.random.normal(keys("noise"), (*shape, *latent_shape)),
            t=jax.random.randint(keys("t"), shape, 0, self.schedule.num_timesteps),
            null=jax.random.bernoulli(keys("null"), self.null_prompt_probability, shape),
        )

    def forward(
        self, params: Params, frozen: Frozen, x: jax.Array, text: Text, noise: ScoreNoise
    ) -> jax.Array:
        """Returns the denoising loss [B] on samples x, with the prompts of some of them dropped."""
        x_t = rounded(add_noise(self.schedule, x, noise.noise, noise.t), self.compute_dtype)

        def dropped(null: jax.Array, own: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(noise.null, tuple(range(1, own.ndim))), null[None], own)

        output = self.network.apply(
            self.weights(params, frozen),
            x_t.astype(self.compute_dtype),
            noise.t,
            *jax.tree.map(dropped, frozen["null_text"], text),
            lora_scale=self.lora_scale,
        )
        epsilon = to_epsilon(self.schedule, output.astype(jnp.float32), x_t, noise.t)
        return score_loss(self.schedule, epsilon, noise.noise, noise.t)
