"""The student: the network that becomes the generator of one step, or of few, and how it makes a sample."""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.devices.programs import INLINE
from sbv2_jax.diffusion.few_steps import check_timesteps
from sbv2_jax.diffusion.samplers import Denoise, few_steps, x0_at
from sbv2_jax.diffusion.schedule import Schedule, add_noise
from sbv2_jax.distill.player import Player, Setting, with_lora
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.models.conditions import Text
from sbv2_jax.models.network import Network
from sbv2_jax.models.registry import network
from sbv2_jax.tree import Params


class Start(NamedTuple):
    """The random numbers of a student of n > 1 steps.

    z [B, h, w, C]; `again` [B, n - 1, h, w, C], the noise of each later step; `taken` int32 [B], how many steps are
    behind the one that is trained: one number for the whole batch, in each of its rows.
    """

    z: jax.Array
    again: jax.Array
    taken: jax.Array


def rollout(
    unet: Network,
    schedule: Schedule,
    params: Params,
    z: jax.Array,
    text: Text,
    again: jax.Array | None = None,
    *,
    dtype: jnp.dtype,
    lora_scale: float = 1.0,
) -> jax.Array:
    """Returns the student's sample x = G(z, y), float32 [B, h, w, C]: as in generation.

    G is the x0 that the network predicts at the last timestep from z: for epsilon, (z - s_T eps) / a_T
    (SwiftBrush, Nguyen and Tran, 2024, section 4.2). A student of several `schedule.timesteps` goes on from there
    (`samplers.few_steps`). z float32 [B, h, w, C], `again` [B, n - 1, h, w, C]; `dtype` is that of the arithmetic.
    """
    denoise = _predict(unet, params, text, dtype, lora_scale)
    return few_steps(denoise, schedule, z, again, timesteps_of(schedule), dtype)


def timesteps_of(schedule: Schedule) -> tuple[int, ...]:
    """Returns the timesteps of a student: those that its schedule says, or the last alone."""
    return schedule.timesteps or (schedule.num_timesteps - 1,)


def _predict(unet: Network, params: Params, text: Text, dtype: jnp.dtype, lora_scale: float) -> Denoise:
    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
        output = unet.apply(params, x.astype(dtype), t, *text, lora_scale=lora_scale)
        return output.astype(jnp.float32)

    return predict


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Student(Player):
    """The player that every term trains."""

    name: ClassVar[str] = "student"

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the student of a run: all weights, or a LoRA on what it starts from."""
        part, values = setting.parts["student"], config.student
        rate = setting.rate(values.lr, 1)
        common = {
            "schedule": _with_timesteps(setting.schedules["student"], tuple(values.timesteps)),
            "optimizer": setting.optimizer(rate),
            "rate": rate,
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

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps at which it predicts x0, falling."""
        return timesteps_of(self.schedule)

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> jax.Array | Start:
        """Returns z, [B, h, w, C], and for several steps what else they take.

        One step of them is trained at a time, for the whole batch as in DMD2's training code: a choice for each sample
        would take the earlier steps of all for every update.
        """
        z = jax.random.normal(keys("z"), (batch_size, *latent_shape))
        if len(self.timesteps) == 1:
            return z
        further = (batch_size, len(self.timesteps) - 1, *latent_shape)
        taken = jax.random.randint(keys("taken"), (), 0, len(self.timesteps))
        return Start(z, jax.random.normal(keys("again"), further), jnp.full((batch_size,), taken))

    def entered(
        self, params: Params, frozen: Frozen, start: Start, text: Text
    ) -> tuple[jax.Array, jax.Array]:
        """Returns where a student of several steps is before the one that is trained: x_t [B, h, w, C] and t [B].

        Backward simulation (DMD2, Yin et al., 2024, section 4.5): what is noised is the student's own prediction, as in
        generation, not a real picture. Steps that are not taken cost nothing.
        """
        weights, timesteps = self.weights(params, frozen), jnp.array(self.timesteps, jnp.int32)
        denoise = _predict(self.network, weights, text, self.compute_dtype, self.lora_scale)
        taken, shape = jnp.max(start.taken), start.taken.shape

        def step(x: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
            number, noise = row

            def noised(x: jax.Array) -> jax.Array:
                t, following = (jnp.full(shape, timesteps[number + later]) for later in (0, 1))
                x0 = x0_at(denoise, self.schedule, x, t, self.compute_dtype)
                return add_noise(self.schedule, x0, noise, following)

            return jax.lax.cond(number < taken, noised, lambda x: x, x), ()

        rows = (jnp.arange(len(timesteps) - 1), jnp.moveaxis(start.again, 1, 0))
        x, _ = INLINE.fold("earlier steps", step, start.z, rows)
        return x, jnp.full(shape, timesteps[taken])

    def forward(
        self, params: Params, frozen: Frozen, x: jax.Array, text: Text, t: jax.Array | None = None
    ) -> jax.Array:
        """Returns the samples: the x0 that is predicted from x at the timesteps t [B], or at the first from z = x."""
        if t is None:
            t = jnp.full(x.shape[:1], self.timesteps[0], jnp.int32)
        denoise = _predict(
            self.network, self.weights(params, frozen), text, self.compute_dtype, self.lora_scale
        )
        return x0_at(denoise, self.schedule, x, t, self.compute_dtype)


def _with_timesteps(schedule: Schedule, timesteps: tuple[int, ...]) -> Schedule:
    """Returns a student's schedule: what it starts from may have been drawn in other steps."""
    check_timesteps(timesteps, schedule.num_timesteps, "config.student.timesteps")
    own = () if timesteps == (schedule.num_timesteps - 1,) else timesteps
    return dataclasses.replace(schedule, timesteps=own, original_inference_steps=None)
