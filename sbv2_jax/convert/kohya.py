"""The names of LoRA files that kohya's scripts and the web UIs share: paths with underscores for dots."""

import re
from collections.abc import Iterable

from sbv2_jax.errors import InputError

_NAME = re.compile(r"lora_unet_(?P<layer>\w+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")


def diffusers_names(names: Iterable[str], layers: Iterable[str], source: str) -> dict[str, str]:
    """Maps every name of a file to the name that diffusers gives it; other names than kohya's stay.

    `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` is `mid_block.attentions.0.proj_in.lora.down.weight`.
    Which underscores are dots only the network's own `layers` tell.
    Raises InputError, starting with `source`, that lists the names of no layer and those of several.
    """
    by_path: dict[str, list[str]] = {}
    for layer in layers:
        by_path.setdefault(layer.replace(".", "_"), []).append(layer)
    found, wrong = {}, []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            found[name] = name
            continue
        meant = by_path.get(match["layer"], [])
        if len(meant) == 1:
            found[name] = f"{meant[0]}.{match['part'].replace('lora_', 'lora.')}"
        else:
            wrong.append(f"{name} is {'both ' + ' and '.join(meant) if meant else 'not there'}")
    if wrong:
        raise InputError(
            f"{source} names layers unlike the network's in {len(wrong)} tensors: {'; '.join(wrong)}"
        )
    return found
