"""Two CLIPs of the world: one whose text tower conditions the UNet, one for the clamped loss."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sbv2_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sbv2_jax.models.clip_image import preprocess
from sbv2_jax.models.network import Network
from sbv2_jax.models.tokenizer import Tokenizer
from sbv2_jax.openmoji.pretrain.loop import Loss, Metrics, split_rows
from sbv2_jax.openmoji.pretrain.losses import contrastive_loss
from sbv2_jax.openmoji.pretrain.pictures import in_batches, to_float
from sbv2_jax.tree import Arrays, Params

T = TypeVar("T")

_MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al., 2021, section 2.5


def clip_config(settings: ConfigDict, tokenizer: Tokenizer, image_size: int) -> CLIPConfig:
    """Returns the configuration of both towers."""
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=tokenizer.max_length,
        hidden_size=settings.text_width,
        intermediate_size=4 * settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_heads,
        projection_dim=settings.projection,
        bos_token_id=tokenizer.eos_token_id - 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=image_size,
        patch_size=settings.patch,
        hidden_size=settings.vision_width,
        intermediate_size=4 * settings.vision_width,
        num_hidden_layers=settings.vision_layers,
        num_attention_heads=settings.vision_heads,
        projection_dim=settings.projection,
    )
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection)


def clip_loss(network: Network, settings: ConfigDict, image_size: int) -> Loss:
    """Returns the loss over inputs {"pictures", "ids": int32 [N, phrasings, S], and those of `World.twins`}.

    A batch holds `twins` pictures of each identity, so that background, size and place decide as well.
    """

    def loss(params: Params, inputs: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        group, member, phrasing = jax.random.split(key, 3)
        rows = _rows(group, member, inputs, settings.batch_size, settings.twins)
        texts = inputs["ids"][rows, jax.random.randint(phrasing, rows.shape, 0, inputs["ids"].shape[1])]
        images = preprocess(to_float(inputs["pictures"][rows]), image_size)
        limited = {**params, "logit_scale": jnp.minimum(params["logit_scale"], _MAX_LOGIT_SCALE)}
        logits = network.apply(limited, texts, images)
        value = contrastive_loss(logits).mean()
        right = jnp.arange(rows.shape[0])
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == right)
        return value, {"loss/contrastive": value, "accuracy": accuracy, "scale": limited["logit_scale"]}

    return loss


def _rows(group: jax.Array, member: jax.Array, inputs: Any, batch: int, twins: int) -> jax.Array:
    """Returns the pictures of a batch [B]: some identities, and `twins` pictures of each, with replacement."""
    chosen = jax.random.randint(group, (batch // twins,), 0, inputs["count"].shape[0])
    chosen = jnp.repeat(chosen, twins)
    place = jax.random.randint(member, (batch,), 0, inputs["count"][chosen])
    return split_rows(inputs["order"][inputs["start"][chosen] + place])


def accuracy(
    network: Network, params: Arrays, ids: np.ndarray, image_size: int, pictures: np.ndarray
) -> float:
    """Returns the share of uint8 pictures [N, H, W, 3] whose own caption, of all ids [N, S], fits them best."""

    def image_features(params: Params, pictures: jax.Array) -> jax.Array:
        return network.apply(params, preprocess(to_float(pictures), image_size), method="image_features")

    def text_features(params: Params, ids: jax.Array) -> jax.Array:
        return network.apply(params, ids, method="text_features")

    images, texts = (
        in_batches(jax.jit(image_features), params, pictures),
        in_batches(jax.jit(text_features), params, ids),
    )
    cosine = images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    return float(np.mean(cosine.argmax(1) == np.arange(len(ids))))


def text_tower(params: Mapping[str, T]) -> dict[str, T]:
    """Returns the parameters of the text tower alone, those of a `CLIPTextModel`."""
    return {name: leaf for name, leaf in params.items() if name.startswith("text_model.")}
