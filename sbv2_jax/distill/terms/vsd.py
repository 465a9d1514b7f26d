"""Variational score distillation (VSD): its gradient in two weightings, the surrogate loss, and the term."""

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.diffusion.samplers import interleaved, separated
from sbv2_jax.diffusion.schedule import (
    Schedule,
    add_noise,
    classifier_free_guidance,
    coefficients,
    epsilon_to_x0,
    is_guided,
    rounded,
    to_epsilon,
)
from sbv2_jax.distill.player import Player, Setting
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.score import Score
from sbv2_jax.distill.terms.term import Given, Term
from sbv2_jax.errors import InputError
from sbv2_jax.models.conditions import like

WEIGHTINGS = ("sbv2", "dmd")


def vsd_gradient(
    schedule: Schedule,
    weighting: str,
    x: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    teacher_epsilon: jax.Array,
    score_epsilon: jax.Array,
) -> jax.Array:
    """Returns the direction, [B, h, w, C], along which a descent of x approaches the teacher's distribution.

    x is the student's sample, x_t its noised version at t [B], the two epsilons are the guided predictions
    for x_t. Weighting "sbv2": s_t^2 (eps_T - eps_S) (ProlificDreamer, Wang et al., 2023, equation 9, with
    SwiftBrush's weight). "dmd": (x0_S - x0_T) / mean |x - x0_T| (Yin et al., 2024, equations 7 and 8); the
    two differ by a factor for each sample alone, as s_t^2 (eps_T - eps_S) = s_t a_t (x0_S - x0_T).
    Raises TypeError unless every array is float32.
    """
    _, s = coefficients(schedule, t, x, x_t, teacher_epsilon, score_epsilon)
    if weighting == "sbv2":
        return s**2 * (teacher_epsilon - score_epsilon)
    if weighting == "dmd":
        teacher_x0 = epsilon_to_x0(schedule, teacher_epsilon, x_t, t)
        score_x0 = epsilon_to_x0(schedule, score_epsilon, x_t, t)
        error = jnp.mean(jnp.abs(x - teacher_x0), axis=_inner(x), keepdims=True)
        return (score_x0 - teacher_x0) / error
    raise ValueError(f"weighting={weighting!r} is none of {WEIGHTINGS}")


def vsd_loss(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns 1/2 mean |x - sg(x - gradient)|^2, [B], whose gradient to x is `gradient` over a sample's size.

    The surrogate of DMD (Yin et al., 2024, appendix); its value tells the gradient's size, nothing more.
    """
    target = jax.lax.stop_gradient(x - gradient)
    return 0.5 * jnp.mean((x - target) ** 2, axis=_inner(x))


class VSDNoise(NamedTuple):
    """The random numbers of the term: noise [B, h, w, C], t [B], and the guidance [B] where it is a range."""

    noise: jax.Array
    t: jax.Array
    guidance: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VSD(Term):
    """Variational score distillation: the teacher pulls the samples, the score model tells where they are.

    `score` is the score model, whose network without its LoRA is the teacher. The teacher's `guidance` is a number, or
    a range (low, high) from which each sample has its own, uniformly (SNOOPI, Nguyen et al., 2024, equation 4).
    """

    name: ClassVar[str] = "vsd"
    players: ClassVar[tuple[type[Player], ...]] = (Score,)

    score: Player
    scale: float = 1.0
    guidance: float | tuple[float, float] = 4.5
    score_guidance: float = 4.5
    weighting: str = "sbv2"
    t_min: int = 20
    t_max: int = 980

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the term of a run; raises InputError for times that the teacher does not know."""
        values, score = config.vsd, setting.players[Score.name]
        if values.t_max >= score.schedule.num_timesteps:
            raise InputError(f"config.vsd.t_max = {values.t_max} is beyond the teacher's last timestep")
        return cls(
            score=score,
            scale=values.weight,
            guidance=tuple(values.guidance) if isinstance(values.guidance, list | tuple) else values.guidance,
            score_guidance=values.score_guidance,
            weighting=values.weighting,
            t_min=values.t_min,
            t_max=values.t_max,
        )

    def weight(self, step: jax.Array) -> float:
        """Returns its weight, the same at every step."""
        return self.scale

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> VSDNoise:
        """Returns what noises the samples, t ~ U{t_min .. t_max}."""
        noise = VSDNoise(
            noise=jax.random.normal(keys("noise"), (batch_size, *latent_shape)),
            t=jax.random.randint(keys("t"), (batch_size,), self.t_min, self.t_max + 1),
        )
        if not isinstance(self.guidance, tuple):
            return noise
        low, high = self.guidance
        return noise._replace(
            guidance=jax.random.uniform(keys("guidance"), (batch_size,), minval=low, maxval=high)
        )

    def prepare(self, given: Given, x: jax.Array) -> jax.Array:
        """Returns the VSD gradient at x, [B, h, w, C], from one forward of the UNet over all rows.

        Teacher and score, conditional and not, differ by the text and by a per-row LoRA scale (0 for the
        teacher), so one copy of the network in the program serves them all. A guidance of 1 or
        less is none and has no unconditional rows.
        """
        score, noise, text = self.score, given.noise, given.text
        schedule = score.schedule
        x_t = rounded(add_noise(schedule, x, noise.noise, noise.t), score.compute_dtype)
        null = like(given.frozen["null_text"], text)
        guidance = noise.guidance if isinstance(self.guidance, tuple) else self.guidance
        ranged = isinstance(self.guidance, tuple)
        both = ((ranged or is_guided(guidance), 0.0), (is_guided(self.score_guidance), score.lora_scale))
        passes = [(rows, scale) for two, scale in both for rows in ((text, null) if two else (text,))]
        output = score.network.apply(
            score.weights(given.params[score.name], given.frozen),
            interleaved(*[x_t.astype(score.compute_dtype)] * len(passes)),
            interleaved(*[noise.t] * len(passes)),
            *interleaved(*(rows for rows, _ in passes)),
            lora_scale=interleaved(*(jnp.full(noise.t.shape, scale) for _, scale in passes)),
        )
        rows = iter(separated(output.astype(jnp.float32), len(passes)))

        def guided(two: bool, guidance: float | jax.Array) -> jax.Array:
            conditional = next(rows)
            if two:
                conditional = classifier_free_guidance(conditional, next(rows), guidance)
            return to_epsilon(schedule, conditional, x_t, noise.t)

        teacher_epsilon = guided(both[0][0], guidance)
        score_epsilon = guided(both[1][0], self.score_guidance)
        return vsd_gradient(schedule, self.weighting, x, x_t, noise.t, teacher_epsilon, score_epsilon)

    def loss(self, given: Given, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the surrogate [B] whose gradient is what was prepared."""
        return vsd_loss(x, given.prepared), {}


def _inner(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))
