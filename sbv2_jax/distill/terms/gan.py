"""The GAN loss in latent space: a discriminator tells the student's samples from real latents of the same prompts."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.diffusion.schedule import add_noise
from sbv2_jax.distill.player import Player, Setting
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.distill.terms.term import Column, Given, Rows, Term, rows_of
from sbv2_jax.models.conditions import Text
from sbv2_jax.models.config import ModelConfig, of_kind
from sbv2_jax.models.discriminator import DiscriminatorHead
from sbv2_jax.models.network import Network
from sbv2_jax.models.part import Part
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.tree import Params

READER = "sbv2_jax.data.real_latents:open_real_latents"
# A real picture's latent, and whether the row has one.
LATENTS, REAL = "real_latents", "real"


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Returns softplus(fake) + softplus(-real) of the logits of real latents and of samples, [B].

    DMD2 (Yin et al., 2024), section 4.3, whose D is the sigmoid of the logit.
    """
    return jax.nn.softplus(fake) + jax.nn.softplus(-real)


def generator_loss(fake: jax.Array) -> jax.Array:
    """Returns softplus(-fake) = -log D of the logits of samples, [B]: non-saturating (DMD2, section 4.3)."""
    return jax.nn.softplus(-fake)


class Noising(NamedTuple):
    """The random numbers that noise latents: noise [B, h, w, C], t [B]."""

    noise: jax.Array
    t: jax.Array

    @classmethod
    def draw(cls, keys: NamedKeys, prefix: str, shape: tuple[int, ...], timesteps: int) -> Self:
        """Draws them; t ~ U{0 .. timesteps - 1}, as in DMD2's training code."""
        return cls(
            noise=jax.random.normal(keys(f"{prefix}noise"), shape),
            t=jax.random.randint(keys(f"{prefix}t"), shape[:1], 0, timesteps),
        )


class Compared(NamedTuple):
    """Real latents [B, h, w, C], in which rows there are any, bool [B], and what noises them and the samples."""

    latents: jax.Array
    there: jax.Array
    real: Noising
    fake: Noising


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Discriminator(Player):
    """The player that tells real latents from the student's samples: a head on the teacher's features.

    The features are those of the teacher's middle block, of noised latents and their prompt; `unet` is the teacher's
    network, whose weights stay as they are, as in LADD (Sauer et al., 2024). DMD2 takes those of its score model, which
    here is the teacher with a LoRA, and trains it by this loss as well. The loss of rows with real latents is times
    `scale`, and that of the others is 0, so that the mean over the batch is that over the former.
    """

    name: ClassVar[str] = "discriminator"

    unet: Network
    teacher: Part[ModelConfig]
    scale: float = 1.0

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the discriminator of a run."""
        part, rate = setting.parts["teacher"], setting.rate(config.gan.lr, 1)
        unet = of_kind(part.config, UNetConfig, "the teacher")
        side = setting.latent_shape[0] // 2 ** (len(unet.block_out_channels) - 1)
        channels, groups = unet.block_out_channels[-1], unet.norm_num_groups
        return cls(
            network=Network(lambda rngs: DiscriminatorHead(channels, side, groups, rngs)),
            schedule=setting.schedules["teacher"],
            optimizer=setting.optimizer(rate),
            rate=rate,
            unet=network(unet, execution=setting.execution),
            teacher=part,
            scale=config.batch_size / rows_of(config.gan.share, config.batch_size),
            seed_offset=2,
            compute_dtype=setting.compute_dtype,
        )

    @property
    def frozen_parts(self) -> dict[str, Part[ModelConfig]]:
        """The teacher, whether there is a score model on it or not."""
        return {"teacher": self.teacher}

    def logits(self, params: Params, frozen: Frozen, x: jax.Array, text: Text, noising: Noising) -> jax.Array:
        """Returns the logits of latents x [B, h, w, C], float32 [B]; the head's arithmetic is float32."""
        x_t = add_noise(self.schedule, x, noising.noise, noising.t).astype(self.compute_dtype)
        features = self.unet.apply(frozen["teacher"], x_t, noising.t, *text, method="middle")
        return self.network.apply(params, features.astype(jnp.float32))

    def draw(
        self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]
    ) -> tuple[Noising, Noising]:
        """Returns the random numbers of an update, of real latents and of samples."""
        shape, timesteps = (batch_size, *latent_shape), self.schedule.num_timesteps
        real, fake = (Noising.draw(keys, f"{kind}_", shape, timesteps) for kind in ("real", "fake"))
        return real, fake

    def read(self, batch: Mapping[str, jax.Array], noise: tuple[Noising, Noising]) -> Compared:
        """Returns the random numbers with the real latents of the batch."""
        return Compared(batch[LATENTS], batch[REAL], *noise)

    def forward(self, params: Params, frozen: Frozen, x: jax.Array, text: Text, noise: Compared) -> jax.Array:
        """Returns the loss [B] of samples x and the real latents of their prompts, 0 where there are none."""
        # No gradient goes to the latents: the UNet has no backward pass.
        real = self.logits(params, frozen, noise.latents, text, noise.real)
        fake = self.logits(params, frozen, x, text, noise.fake)
        return jnp.where(noise.there, self.scale * discriminator_loss(real, fake), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GAN(Term):
    """The generator's part of the loss: the discriminator is to take the samples for real.

    In some rows of each batch, which have the prompts of real pictures; the other terms see them as any others. The
    loss of the other rows is 0, and theirs is scaled as the discriminator's.
    """

    name: ClassVar[str] = "gan"
    players: ClassVar[tuple[type[Player], ...]] = (Discriminator,)

    discriminator: Discriminator
    rows: Rows
    scale: float = 1e-3

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self:
        """Builds the term of a run."""
        columns = {LATENTS: Column(setting.latent_shape, "float32"), REAL: Column((), "bool")}
        discriminator = setting.players[Discriminator.name]
        assert isinstance(discriminator, Discriminator)
        return cls(
            discriminator=discriminator,
            rows=Rows(READER, "config.gan.path", rows_of(config.gan.share, config.batch_size), columns),
            scale=config.gan.weight,
        )

    def weight(self, step: jax.Array) -> float:
        """Returns its weight, the same at every step."""
        return self.scale

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> Noising:
        """Returns what noises the samples."""
        timesteps = self.discriminator.schedule.num_timesteps
        return Noising.draw(keys, "", (batch_size, *latent_shape), timesteps)

    def encode(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns in which rows the samples are of a real picture's prompt, bool [B]."""
        return batch[REAL]

    def loss(self, given: Given, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss [B] of the samples, and how real the discriminator takes them to be, from 0 to 1."""
        player, params = self.discriminator, given.params[Discriminator.name]
        logits = player.logits(params, given.frozen, x, given.text, given.noise)
        values = jnp.stack([generator_loss(logits), jax.nn.sigmoid(logits)])
        losses, realism = jnp.where(given.encoded[None], player.scale * values, 0.0)
        return losses, {"realism": realism}
