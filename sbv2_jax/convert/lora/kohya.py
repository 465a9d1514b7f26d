"""The names of layers in LoRA files of kohya's scripts and the web UIs: paths with underscores for dots."""

import re
from collections.abc import Collection, Iterable

PREFIXES = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}
# Of the original code, for parts of a resnet and for the layers outside of the blocks.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(
    r"(?:(?P<way>down|up)_blocks\.(?P<level>\d+)|mid_block)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<index>\d+)\.(?P<rest>.+)"
)


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
    originals = original_names(layers) if part == "unet" else {}
    for layer in layers:
        for name in {layer, layer.removeprefix("text_model."), originals.get(layer, layer)}:
            found.setdefault(name.replace(".", "_"), []).append(layer)
    return found


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """Maps the layers of a UNet to their names in the code of Stable Diffusion's authors.

    There the levels are one list: on the way down a level is its resnets and a downsampler, on the way up its
    resnets alone, the last with the upsampler after it.
    """
    layers = list(layers)
    blocks = {layer: match for layer in layers if (match := _BLOCK.match(layer))}
    resnets: dict[tuple[str, int], set[int]] = {}
    attends = set()
    for block in blocks.values():
        if block["way"]:
            level = (block["way"], int(block["level"]))
            if block["kind"] == "resnets":
                resnets.setdefault(level, set()).add(int(block["index"]))
            elif block["kind"] == "attentions":
                attends.add(level)

    def first(way: str, level: int) -> int:
        more = int(way == "down")  # the downsampler has a place of its own, and conv_in the first
        return more + sum(len(resnets.get((way, one), ())) + more for one in range(level))

    names = {layer: _OUTER[layer] for layer in layers if layer in _OUTER}
    for layer, block in blocks.items():
        kind, index, rest = block["kind"], int(block["index"]), block["rest"]
        rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
        if block["way"] is None:
            names[layer] = f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
            continue
        level = (block["way"], int(block["level"]))
        last = first(*level) + len(resnets.get(level, ()))
        if kind == "downsamplers":
            names[layer] = f"input_blocks.{last}.0.op"
        elif kind == "upsamplers":
            names[layer] = f"output_blocks.{last - 1}.{2 if level in attends else 1}.{rest}"
        else:
            side = "input" if block["way"] == "down" else "output"
            names[layer] = f"{side}_blocks.{first(*level) + index}.{int(kind == 'attentions')}.{rest}"
    return names
