"""The names of layers in LoRA files of kohya's scripts and the web UIs: paths with underscores for dots."""

from collections.abc import Collection

from sbv2_jax.convert.formats.ldm_names import unet_names

PREFIXES = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}


def file_name(layer: str) -> str:
    """Returns what kohya's scripts call a layer of a UNet that has diffusers' names."""
    return f"lora_unet_{layer.replace('.', '_')}"


def spellings(part: str, layers: Collection[str]) -> dict[str, list[str]]:
    """Maps every name that a network's layers have in such files, without its prefix, to the layers it may mean.

    Which underscores are dots only the `layers` tell, all that the network has. A UNet has them in diffusers'
    names and in those of its first code, `input_blocks_4_1_...` (kohya's SDXL); a text encoder with and without
    `text_model_`.
    """
    found: dict[str, list[str]] = {}
    originals = unet_names(layers) if part == "unet" else {}
    for layer in layers:
        for name in {layer, layer.removeprefix("text_model."), originals.get(layer, layer)}:
            found.setdefault(name.replace(".", "_"), []).append(layer)
    return found
