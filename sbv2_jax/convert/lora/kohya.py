"""The names of LoRA files that kohya's scripts and the web UIs share: paths with underscores for dots."""

import re
from collections.abc import Collection, Iterable, Mapping

from sbv2_jax.errors import InputError

_NAME = re.compile(
    r"lora_(?P<part>unet|te[12]?)_(?P<layer>\w+)\.(?P<end>lora_down\.weight|lora_up\.weight|alpha)"
)
_PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}


def diffusers_names(
    names: Iterable[str], layers: Mapping[str, Collection[str]], source: str
) -> dict[str, str]:
    """Maps every name of a file to the name that diffusers gives it; other names than kohya's stay.

    `lora_unet_mid_block_attentions_0_proj_in.alpha` is `unet.mid_block.attentions.0.proj_in.alpha`: which
    underscores are dots only the `layers` of the networks tell, those of "unet", "text_encoder" and "text_encoder_2".
    Raises InputError, starting with `source`, that lists the names of no layer and those of several.
    """
    by_path: dict[tuple[str, str], list[str]] = {}
    for part, paths in layers.items():
        for path in paths:
            by_path.setdefault((part, path.replace(".", "_")), []).append(path)
    found, wrong = {}, []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            found[name] = name
            continue
        part = _PARTS[match["part"]]
        meant = by_path.get((part, match["layer"]), [])
        if len(meant) == 1:
            found[name] = f"{part}.{meant[0]}.{match['end'].replace('lora_', 'lora.')}"
        else:
            wrong.append(f"{name} is {'both ' + ' and '.join(meant) if meant else 'not there'}")
    if wrong:
        raise InputError(
            f"{source} names layers unlike the network's in {len(wrong)} tensors: {'; '.join(wrong)}"
        )
    return found
