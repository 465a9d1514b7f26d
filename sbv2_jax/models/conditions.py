"""What a UNet takes of a prompt, and the CLIP text towers that make it of token ids: one tower, or SDXL's two."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbv2_jax.models.clip import CLIPTextConfig
from sbv2_jax.models.network import Network
from sbv2_jax.models.transformer import Context, Steered
from sbv2_jax.models.unet import AddedConditions, UNetConfig
from sbv2_jax.tree import Params, Shapes

# The folders of the towers, in the order in which SDXL joins what they give.
TOWERS = ("text_encoder", "text_encoder_2")


class Text(NamedTuple):
    """The conditions of a UNet, as it takes them after latents and time: `apply(params, x, t, *text)`.

    `context` [B, S, D], or `Steered`; `added` is None but for SDXL. The null condition has no batch axis.
    """

    context: Context
    added: AddedConditions | None = None

    @property
    def plain(self) -> jax.Array:
        """The context; raises ValueError where it is `Steered`."""
        if isinstance(self.context, Steered):
            raise ValueError("a context that is steered is not steered again, nor mixed with another")
        return self.context


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """The text towers of a pipeline, by the name of their folder, as one function of flat parameters.

    Stable Diffusion 1.x and 2.x take the last hidden state of `text_encoder`. SDXL takes the penultimate ones of
    both towers side by side, the pooled text of the second, and the size of the picture in pixels:
    `downsampling` is how many of them a latent spans. With `zero_null` its null condition is zeros, as
    `force_zeros_for_empty_prompt` of its model_index.json says, in place of the encoded empty prompt.
    Source: SDXL (Podell et al., 2023), and diffusers' `StableDiffusionXLPipeline.encode_prompt`.
    """

    towers: Mapping[str, Network]
    downsampling: int = 8
    zero_null: bool = False

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The abstract parameters of all towers, named as `join_towers` names them."""
        return join_towers({name: tower.shapes for name, tower in self.towers.items()})

    def apply(self, params: Params, input_ids: jax.Array, latent_shape: tuple[int, ...]) -> Text:
        """Returns the conditions of prompts: token ids [B, S], or [B, 2, S] for two towers.

        `latent_shape` begins with the height and width of the latents.
        """
        if len(self.towers) == 1:
            (tower,) = self.towers.values()
            return Text(tower.apply(params, input_ids).last_hidden_state)
        parts = split_towers(params, self.towers)
        outputs = [
            tower.apply(parts[name], input_ids[:, i], output_hidden_states=True)
            for i, (name, tower) in enumerate(self.towers.items())
        ]
        height, width = (self.downsampling * side for side in latent_shape[:2])
        # Original size, the corner of the crop, target size: the whole of a picture that was never resized.
        sizes = jnp.array([height, width, 0, 0, height, width], jnp.int32)
        return Text(
            jnp.concatenate([output.hidden_states[-2] for output in outputs], axis=-1),
            AddedConditions(outputs[-1].pooled, jnp.broadcast_to(sizes, (input_ids.shape[0], 6))),
        )

    def null(self, params: Params, null_ids: jax.Array, latent_shape: tuple[int, ...]) -> Text:
        """Returns the null condition, without a batch axis, of the empty prompt's ids [S] or [2, S]."""
        text = jax.tree.map(lambda leaf: leaf[0], self.apply(params, null_ids[None], latent_shape))
        if not self.zero_null:
            return text
        context, pooled = jnp.zeros_like(text.context), jnp.zeros_like(text.added.text_embeds)
        return Text(context, text.added._replace(text_embeds=pooled))


def steered(text: Text, away: Text, scale: jax.Array | float) -> Text:
    """Returns conditions of a prompt that keep away from those of another, as `Steered` has it."""
    return text._replace(context=Steered(text.plain, away.plain, jnp.asarray(scale)))


def like(null: Text, text: Text) -> Text:
    """Returns the null condition as often as there are rows in `text`."""
    return jax.tree.map(lambda one, rows: jnp.broadcast_to(one, rows.shape), null, text)


def join_towers(towers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the leaves of all towers in one dictionary: one tower's own names, several behind their folders'."""
    if len(towers) == 1:
        return dict(*towers.values())
    return {f"{tower}.{name}": leaf for tower, leaves in towers.items() for name, leaf in leaves.items()}


def split_towers(leaves: Mapping[str, Any], towers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns what `join_towers` joined, by tower."""
    towers = list(towers)
    if len(towers) == 1:
        return {towers[0]: dict(leaves)}
    found: dict[str, dict[str, Any]] = {tower: {} for tower in towers}
    for name, leaf in leaves.items():
        tower, _, rest = name.partition(".")
        found[tower][rest] = leaf
    return found


def misfits(unet: UNetConfig, towers: Mapping[str, CLIPTextConfig]) -> list[str]:
    """Returns how a UNet's conditions differ from what the towers give, in the names of the files' fields."""
    wrong = []
    if set(unet.per_level("cross_attention_dim")) != {sum(tower.hidden_size for tower in towers.values())}:
        widths = " + ".join(f"{name} hidden_size={tower.hidden_size}" for name, tower in towers.items())
        wrong.append(f"unet cross_attention_dim={unet.cross_attention_dim}, {widths}")
    if (unet.addition_embed_type == "text_time") != (len(towers) == 2):
        wrong.append(f"unet addition_embed_type={unet.addition_embed_type!r} needs another pipeline class")
    elif len(towers) == 2:
        pooled = towers[TOWERS[1]].projection_dim
        given = pooled + 6 * (unet.addition_time_embed_dim or 0)
        if unet.projection_class_embeddings_input_dim != given:
            wrong.append(
                f"unet projection_class_embeddings_input_dim={unet.projection_class_embeddings_input_dim}, "
                f"{TOWERS[1]} projection_dim={pooled} and 6 sizes of {unet.addition_time_embed_dim} are {given}"
            )
        lengths = {name: tower.max_position_embeddings for name, tower in towers.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} max_position_embeddings={one}" for name, one in lengths.items())
            wrong.append(found)
    return wrong
