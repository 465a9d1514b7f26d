"""The score model: a LoRA on the teacher that follows the distribution of the student's samples."""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import Schedule, add_noise, coefficients, ideal_output, rounded, to_epsilon
from sbv2_jax.distill.player import Player, Setting, with_lora
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params

WEIGHTINGS = ("epsilon", "v", "native")


class ScoreNoise(NamedTuple):
    """The random numbers of an update: noise [B, h, w, C], t [B], null [B] (the prompt is dropped)."""

    noise: jax.Array
    t: jax.Array
    null: jax.Array


def score_loss(
    schedule: Schedule,
    weighting: str,
    output: jax.Array,
    x: jax.Array,
    x_t: jax.Array,
    noise: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Returns the denoising loss of a score model's output for x_t = a_t x + s_t noise, [B].

    Weighting "epsilon": a_t^2 mean |eps_S - noise|^2, as in SwiftBrush's training. "v": mean |v_S - v|^2, which
    is the same over a_t^4. "native": the mean squared error of what the network predicts, one or the other.
    All arrays float32 [B, h, w, C], t int32 [B]; raises TypeError for other dtypes.
    """
    a, _ = coefficients(schedule, t, output, x, x_t, noise)
    if weighting == "epsilon":
        error = a * (to_epsilon(schedule, output, x_t, t) - noise)
    elif weighting in WEIGHTINGS:
        error = output - ideal_output(schedule, x, noise, t)
        if weighting == "v" and schedule.prediction_type == "epsilon":
            error = error / a  # eps = s_t x_t + a_t v, of one x_t
    else:
        raise ValueError(f"weighting={weighting!r} is none of {WEIGHTINGS}")
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Score(Player):
    """The player that learns to denoise the student's samples; `schedule` is the teacher's."""

    name: ClassVar[str] = "score"

    null_prompt_probability: float = 0.1
    weighting: str = "epsilon"

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the score model of a run."""
        part, values = setting.parts["teacher"], config.score
        rate = setting.rate(values.lr, values.updates_per_step)
        return cls(
            network=with_lora(part, setting.execution, values.targets, values.rank),
            schedule=setting.schedules["teacher"],
            optimizer=setting.optimizer(rate),
            rate=rate,
            part=part,
            base="teacher",
            lora_scale=values.alpha / values.rank,
            updates=values.updates_per_step,
            compute_dtype=setting.compute_dtype,
            null_prompt_probability=values.null_prompt_probability,
            weighting=values.weighting,
        )

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> ScoreNoise:
        """Returns the random numbers of an update."""
        # Of one update: without this axis XLA's CPU compiler fuses, and so rounds, the step in another way.
        shape = (1, batch_size)
        noise = ScoreNoise(
            noise=jax.random.normal(keys("noise"), (*shape, *latent_shape)),
            t=jax.random.randint(keys("t"), shape, 0, self.schedule.num_timesteps),
            null=jax.random.bernoulli(keys("null"), self.null_prompt_probability, shape),
        )
        return jax.tree.map(lambda a: a[0], noise)

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
        output = output.astype(jnp.float32)
        return score_loss(self.schedule, self.weighting, output, x, x_t, noise.noise, noise.t)
