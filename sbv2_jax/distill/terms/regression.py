"""The regression of image regularisation: from a pair's noise the student is to draw what the teacher drew of it."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.distill.player import Setting
from sbv2_jax.distill.random_numbers import initial_noise
from sbv2_jax.distill.state import Frozen
from sbv2_jax.distill.terms.term import Column, Given, Rows, Term, rows_of

READER = "sbv2_jax.data.pairs:open_pairs"
# The pair's number, -1 in the other rows, the seed of its noise, and the teacher's latent.
NUMBERS, SEEDS, LATENTS = "pair_numbers", "pair_seeds", "pair_latents"


def regression_loss(x: jax.Array, target: jax.Array) -> jax.Array:
    """Returns mean |x - target|^2 of float32 latents [B, h, w, C], [B] (DMD, Yin et al., 2024, 9, in latent space)."""
    return jnp.mean((x - target) ** 2, axis=tuple(range(1, x.ndim)))


class Target(NamedTuple):
    """The teacher's latents, [B, h, w, C], and in which rows there are any, bool [B]."""

    latents: jax.Array
    paired: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Regression(Term):
    """The regression on pairs of noise and the teacher's deterministic sample of it, in some rows of each batch.

    These rows have the prompts and noise of pairs, and the other terms see them as any others. The loss of the other
    rows is 0, and theirs is scaled so that its mean over the batch of `batch_size` is the mean over the pairs.
    """

    name: ClassVar[str] = "regression"

    rows: Rows
    batch_size: int
    scale: float = 1.0

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the term of a run."""
        columns = {
            NUMBERS: Column((), "int32", -1),
            SEEDS: Column((), "uint32"),
            LATENTS: Column(setting.latent_shape, "float32"),
        }
        count = rows_of(config.pairs.share, config.batch_size)
        rows = Rows(READER, "config.pairs.path", count, columns)
        return cls(rows=rows, batch_size=config.batch_size, scale=config.pairs.weight)

    def weight(self, step: jax.Array) -> float:
        """Returns its weight, the same at every step."""
        return self.scale

    def start(self, batch: Mapping[str, jax.Array], z: jax.Array) -> jax.Array:
        """Returns z with the pairs' noise in their rows."""
        noise = initial_noise(batch[SEEDS], batch[NUMBERS], z.shape[1:])
        return jnp.where(_paired(batch, z.ndim), noise, z)

    def encode(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> Target:
        """Returns what its rows are compared with."""
        return Target(batch[LATENTS], _paired(batch))

    def loss(self, given: Given, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss [B] of the samples, 0 where there is no pair."""
        target = given.encoded
        losses = regression_loss(x, target.latents) * (self.batch_size / self.rows.count)
        return jnp.where(target.paired, losses, 0.0), {}


def _paired(batch: Mapping[str, jax.Array], ndim: int = 1) -> jax.Array:
    return jnp.expand_dims(batch[NUMBERS] >= 0, tuple(range(1, ndim)))
