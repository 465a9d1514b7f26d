"""The original names (CompVis, Stability) of the parameters of UNet and autoencoder, from those of diffusers.

    down_blocks.1.attentions.0.norm   input_blocks.4.1.norm        one number for all blocks of a UNet
    up_blocks.0.upsamplers.0.conv     output_blocks.2.2.conv       behind the resnet and what attends
    decoder.up_blocks.0.resnets.1     decoder.up.3.block.1         an autoencoder counts its levels from the top

What is inside a transformer has one name in both.
"""

import re

from sbv2_jax.models.unet import UNetConfig
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


def unet_name(name: str, config: UNetConfig) -> str:
    """Returns the original name of a UNet's tensor, from that in diffusers."""
    layers = config.per_level("layers_per_block")
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name):
        side, level, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        sizes = [count + 1 for count in (layers if side == "down" else layers[::-1])]
        first = sum(sizes[:level])
        attends = config.up_block_types[level] == "CrossAttnUpBlock2D"
        if side == "down":
            place = first + sizes[level] if kind == "downsamplers" else 1 + first + place
            module = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        else:
            place = first + sizes[level] - 1 if kind == "upsamplers" else first + place
            module = {"resnets": "0", "attentions": "1", "upsamplers": f"{1 + attends}.conv"}[kind]
        if kind.endswith("samplers"):
            rest = rest.removeprefix("conv.")
        block = "input" if side == "down" else "output"
        return f"{block}_blocks.{place}.{module}.{_within(rest, _UNET_RESNET) if kind == 'resnets' else rest}"
    ends = _within(name, _UNET_ENDS)
    module, _, rest = ends.partition(".")
    if module == "middle_block" and not rest.startswith("1."):
        place, _, rest = rest.partition(".")
        return f"middle_block.{place}.{_within(rest, _UNET_RESNET)}"
    return ends


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
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name
