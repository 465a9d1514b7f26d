"""The pipelines of diffusers that are read and written, as their model_index.json names them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.clip import CLIPTextConfig
from sbv2_jax.models.conditions import TOWERS, misfits
from sbv2_jax.models.config import AutoencoderConfig, ModelConfig, of_kind
from sbv2_jax.models.registry import class_of
from sbv2_jax.models.unet import UNetConfig

# Of a part: the library and the classes that model_index.json may name.
_Classes = tuple[str, tuple[str, ...]]
_CLIP_TOKENIZER: _Classes = ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))
# Not read: the pictures that they judge or describe are not ours.
_NOT_READ = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
# What model_index.json of SDXL says of its null condition: zeros, or the encoded empty prompt.
_ZERO_NULL = "force_zeros_for_empty_prompt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of pipeline: its class in diffusers, its parts, and what else its model_index.json says."""

    pipeline_class: str
    parts: Mapping[str, _Classes]
    others: Mapping[str, Any]

    @property
    def towers(self) -> tuple[str, ...]:
        """The folders of the text towers."""
        return tuple(name for name in TOWERS if name in self.parts)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The folders of the tokenizers, one for each tower."""
        return tuple(name for name in self.parts if name.startswith("tokenizer"))

    @property
    def networks(self) -> tuple[str, ...]:
        """The folders of the networks."""
        return ("unet", "vae", *self.towers)


STABLE_DIFFUSION = Family(
    pipeline_class="StableDiffusionPipeline",
    parts={
        "unet": ("diffusers", ("UNet2DConditionModel",)),
        "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
        "text_encoder": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
        "tokenizer": _CLIP_TOKENIZER,
        "scheduler": ("diffusers", ScheduleConfig.CLASSES),
    },
    others={
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    },
)
STABLE_DIFFUSION_XL = Family(
    pipeline_class="StableDiffusionXLPipeline",
    parts={
        **STABLE_DIFFUSION.parts,
        "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer_2": _CLIP_TOKENIZER,
    },
    others={"feature_extractor": [None, None], "image_encoder": [None, None], _ZERO_NULL: True},
)
_FAMILIES = {family.pipeline_class: family for family in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)}


def family_of(index: Mapping[str, Any], source: str) -> Family:
    """Returns the kind of pipeline that the values of a model_index.json describe.

    Raises InputError that names the source, for a class that is not supported and, listing all of them, for parts
    that are missing, unknown or of another class.
    """
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in _FAMILIES:
        supported = ", ".join(_FAMILIES)
        raise InputError(f"{source}: pipeline class {found!r} is not supported (only {supported})")
    family = _FAMILIES[found]
    wrong = []
    for name, (library, classes) in family.parts.items():
        entry = index.get(name)
        if entry not in [[library, one] for one in classes]:
            wrong.append(f"{name}={entry!r} is not supported ({library}: {' or '.join(classes)})")
    for name, entry in index.items():
        known = name in family.parts or name in _NOT_READ or name.startswith("_")
        # An optional part that a pipeline does not have is written as [null, null].
        if not known and isinstance(entry, list) and any(entry):
            wrong.append(f"unknown part {name}={entry!r}")
    if not isinstance(index.get(_ZERO_NULL, True), bool):
        wrong.append(f"{_ZERO_NULL}={index[_ZERO_NULL]!r} is neither true nor false")
    if wrong:
        raise InputError(f"{source}: {listed(wrong)}")
    return family


def zero_null(family: Family, index: Mapping[str, Any]) -> bool:
    """Returns whether the null condition of a pipeline is zeros."""
    return _ZERO_NULL in family.others and index.get(_ZERO_NULL, family.others[_ZERO_NULL])


def make_index(
    family: Family, configs: Mapping[str, ModelConfig], scheduler_class: str, zero_null: bool
) -> dict[str, Any]:
    """Returns the values of a pipeline's model_index.json."""
    index = {
        "_class_name": family.pipeline_class,
        **{name: [family.parts[name][0], class_of(configs[name])] for name in family.networks},
        **{name: ["transformers", "CLIPTokenizer"] for name in family.tokenizers},
        "scheduler": ["diffusers", scheduler_class],
        **family.others,
    }
    return index | ({_ZERO_NULL: zero_null} if _ZERO_NULL in family.others else {})


def check_fit(family: Family, configs: Mapping[str, ModelConfig], source: str) -> None:
    """Raises InputError where the networks' widths differ; the messages name fields of the files."""
    unet = of_kind(configs["unet"], UNetConfig, f"{source}: unet")
    decoders = {
        name: of_kind(configs[name], AutoencoderConfig, f"{source}: {name}")
        for name in ("vae", "vae_tiny")
        if name in configs
    }
    vae = decoders["vae"]
    towers = {name: of_kind(configs[name], CLIPTextConfig, f"{source}: {name}") for name in family.towers}
    wrong = misfits(unet, towers)
    for name, decoder in decoders.items():
        if unet.out_channels != decoder.latent_channels:
            channels = decoder.latent_channels
            wrong.append(f"unet out_channels={unet.out_channels}, {name} latent_channels={channels}")
    if unet.in_channels != vae.latent_channels:
        wrong.append(f"unet in_channels={unet.in_channels}, vae latent_channels={vae.latent_channels}")
    if wrong:
        raise InputError(f"{source}: the networks do not fit each other: {'; '.join(wrong)}")
