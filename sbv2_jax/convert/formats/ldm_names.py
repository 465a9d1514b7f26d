"""The original names (CompVis, Stability) of the parameters of UNet and autoencoder, from those of diffusers.

    down_blocks.1.attentions.0.norm   input_blocks.4.1.norm        one number for all blocks of a UNet
    up_blocks.0.upsamplers.0.conv     output_blocks.2.2.conv       behind the resnet and what attends
    decoder.up_blocks.0.resnets.1     decoder.up.3.block.1         an autoencoder counts its levels from the top

What is inside a transformer has one name in both.
"""

import re
from collections.abc import Iterable

from sbv2_jax.models.vae import VAEConfig

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<index>\d+)\.(?P<rest>.+)"
)
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ENDS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the layers of a UNet, all of them, or its tensors, to their original names; one it does not know to itself.

    There the levels are one list: on the way down a level is its resnets and a downsampler, on the way up its
    resnets alone, the last with the upsampler after it. So a place depends on what else there is.
    """
    blocks = {name: _BLOCK.fullmatch(name) for name in names}
    resnets: dict[tuple[str, int], set[int]] = {}
    attends = set()
    for block in filter(None, blocks.values()):
        level = (block["way"], int(block["level"]))
        if block["kind"] == "resnets":
            resnets.setdefault(level, set()).add(int(block["index"]))
        elif block["kind"] == "attentions":
            attends.add(level)

    def first(way: str, level: int) -> int:
        more = int(way == "down")  # the downsampler has a place of its own, and conv_in the first
        return more + sum(len(resnets.get((way, one), ())) + more for one in range(level))

    def original(name: str, block: re.Match | None) -> str:
        if block is None:
            within = _within(name, _UNET_ENDS)
            middle, _, rest = within.partition(".")
            if middle != "middle_block" or rest.startswith("1."):
                return within
            place, _, rest = rest.partition(".")
            return f"middle_block.{place}.{_within(rest, _UNET_RESNET)}"
        way, kind, index, rest = block["way"], block["kind"], int(block["index"]), block["rest"]
        level = (way, int(block["level"]))
        last = first(*level) + len(resnets.get(level, ()))
        if kind == "downsamplers":
            return f"input_blocks.{last}.0.{_within(rest, {'conv': 'op'})}"
        if kind == "upsamplers":
            return f"output_blocks.{last - 1}.{2 if level in attends else 1}.{rest}"
        place = f"{'input' if way == 'down' else 'output'}_blocks.{first(*level) + index}"
        return f"{place}.1.{rest}" if kind == "attentions" else f"{place}.0.{_within(rest, _UNET_RESNET)}"

    return {name: original(name, block) for name, block in blocks.items()}


def vae_name(name: str, config: VAEConfig) -> str:
    """Returns the original name of an autoencoder's tensor, from that in diffusers."""
    pattern = r"(en|de)coder\.(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)"
    if match := re.fullmatch(pattern, name):
        coder, side, level, kind, place, rest = match.groups()
        last = len(config.block_out_channels) - 1
        level = int(level) if side == "down" else last - int(level)
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        module = f"block.{place}" if kind == "resnets" else f"{side}sample"
        return f"{coder}coder.{side}.{level}.{module}.{rest}"
    coder, dot, rest = name.partition(".")
    if not coder.endswith("coder"):
        return name
    rest = _within(rest, _VAE_ENDS)
    if rest.startswith("mid.attn_1."):
        return f"{coder}.mid.attn_1.{_within(rest.removeprefix('mid.attn_1.'), _VAE_ATTENTION)}"
    return coder + dot + rest.replace("conv_shortcut", "nin_shortcut")


def _within(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name
