"""The clamped CLIP loss: a sample's picture is to agree with its prompt, up to a bound."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sbv2_jax.distill.player import Setting
from sbv2_jax.distill.state import Frozen
from sbv2_jax.distill.terms.pictures import Decode, decoder
from sbv2_jax.distill.terms.term import Given, Source, Term
from sbv2_jax.errors import InputError
from sbv2_jax.models.clip_image import preprocess
from sbv2_jax.models.registry import network
from sbv2_jax.tree import Params


def clamped_clip_loss(image_features: jax.Array, text_features: jax.Array, tau: float) -> jax.Array:
    """Returns max(0, tau - cosine), [B], of features [B, D] (SwiftBrush v2, equation 5).

    The clamp is per sample: one that agrees with its text by more than tau is left alone.
    """
    return jax.nn.relu(tau - cosine(image_features, text_features))


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the cosine between vectors [B, D], [B]."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / norms


def weight_at(first: float, schedule: str, step: jax.Array | int, steps: int) -> jax.Array | float:
    """Returns the weight of the loss after `step` of `steps` steps, which begins as `first`.

    Schedule "linear": it falls linearly to nothing (SwiftBrush v2, section 4.3); "constant": it stays.
    """
    return first * (1.0 - step / steps) if schedule == "linear" else first


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClampedCLIP(Term):
    """The clamped CLIP loss, whose gradient flows through CLIP, the resize and the decoder into the samples.

    `image_features(params, pictures)` and `text_features(params, input_ids)` return [B, D]. `first` is its weight at
    step 0, which changes by the `schedule` over `steps` steps (`weight_at`). The fields of the configuration's group
    `name` are its own, and the CLIP has that name; the decoder is one for all.
    """

    name: ClassVar[str] = "clip"
    columns: ClassVar[Mapping[str, str]] = {"clip_input_ids": "clip"}

    decode: Decode
    image_features: Callable[[Params, jax.Array], jax.Array]
    text_features: Callable[[Params, jax.Array], jax.Array]
    steps: int
    first: float = 0.0
    schedule: str = "linear"
    tau: float = 0.35
    passes: int = 1

    @classmethod
    def sources(cls, config: ConfigDict) -> dict[str, Source]:
        """Returns the CLIP and the decoder; nothing where the group names no model."""
        own = config.get(cls.name)
        if not (own and own.model):
            return {}
        return {
            cls.name: Source(own.model, "clip", f"config.{cls.name}.model"),
            "decoder": Source(config.clip.decoder, "vae_tiny", "config.clip.decoder"),
        }

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self | None:
        """Builds the term of a run; None where the group names no model."""
        if not cls.sources(config):
            return None
        own, part = config[cls.name], setting.parts[cls.name]
        clip, image = network(part.config), part.image
        if image is None:
            raise InputError(f"config.{cls.name}.model: {part.directory} is no CLIP")

        def image_features(params: Params, pictures: jax.Array) -> jax.Array:
            pixels = preprocess(pictures, image.size, image.image_mean, image.image_std)
            return clip.apply(params, pixels, method="image_features")

        def text_features(params: Params, input_ids: jax.Array) -> jax.Array:
            return clip.apply(params, input_ids, method="text_features")

        return cls(
            decode=decoder(setting, "decoder", "config.clip.decoder"),
            image_features=image_features,
            text_features=text_features,
            steps=config.steps,
            first=own.weight,
            schedule=own.schedule,
            tau=own.tau,
            passes=config.clip.passes,
        )

    def weight(self, step: jax.Array) -> jax.Array | float:
        """Returns its weight at a step."""
        return weight_at(self.first, self.schedule, step, self.steps)

    def encode(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the features of the prompts, [B, D]."""
        (column,) = self.columns
        return self.text_features(frozen[self.name], batch[column]).astype(jnp.float32)

    def loss(self, given: Given, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss [B] of the decoded samples, the cosines that it is made of, and which are left alone."""
        pictures = self.decode(given.frozen["decoder"], x)
        features = self.image_features(given.frozen[self.name], pictures).astype(jnp.float32)
        cosines = cosine(features, given.encoded)
        metrics = {"cosine": cosines, "clamped": (cosines >= self.tau).astype(jnp.float32)}
        return clamped_clip_loss(features, given.encoded, self.tau), metrics
