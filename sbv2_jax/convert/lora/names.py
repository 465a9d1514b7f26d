"""What a tensor's name means in a LoRA file: the network, the layer, and the part of its update.

Read are the names of diffusers (today's and those of 2023), PEFT, kohya's scripts, LyCORIS and ComfyUI.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from sbv2_jax.convert.formats.safetensors_io import TensorInfo
from sbv2_jax.convert.lora.kohya import PREFIXES, spellings
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.clip import tensors_of_file

PEFT_PREFIX = "base_model.model."
# The parts that LyCORIS's kinds of update are made of; the names of PEFT's are the same.
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{name: name for name in (*LOHA, *LOKR)},
}
_NAME = re.compile(rf"(?P<layer>.+)\.(?P<role>{'|'.join(map(re.escape, _ROLES))})")
# diffusers before 0.22 kept an attention's LoRA in its processor, and CLIP's under the same four names.
_OF_2023 = re.compile(
    r"(?P<attention>.+?)(?:\.processor)?\.to_(?P<to>q|k|v|out)_lora\.(?P<role>down|up)\.weight"
)
_KOHYA = re.compile(rf"lora_(?P<part>{'|'.join(PREFIXES)})_(?P<layer>\w+)")
_DOTTED = re.compile(
    r"(?:base_model\.model\.)?(?:(?P<part>unet|text_encoder|text_encoder_2)\.)?(?P<layer>\w[\w.]*)"
)
_COMFY_PREFIX = "diffusion_model."
# Kinds of update that are not read, by what their tensors' names end with.
_VARIANTS = {
    r"\.[ab][12]\.weight": "GLoRA",
    r"\.oft_(blocks|diag|R\.weight|r)": "OFT",
    r"\.boft_\w+": "BOFT",
    r"\.(diff|diff_b)": "full differences of weights",
    r"\.(w_norm|b_norm)": "differences of normalisations",
    r"\.(on_input|ia3_l)": "IA3",
    r"\.lora_E|\.ranknum": "AdaLoRA",
    r"\.lora_(B|up)\.bias": "biases (lora_bias)",
    r"\.lora_embedding_[AB]": "embeddings",
    r"\.(vera_lambda_[bd]|vera_[AB])": "VeRA",
    r"\.reshape_weight": "layers of another shape (reshape_weight)",
}
_MAX_NAME = 300
# The width of what a UNet's cross-attention reads.
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
_CROSS = re.compile(r".*[._]attn2[._]to_[kv]")


class Place(NamedTuple):
    """What a tensor is: `role` is "down", "up", "mid", "alpha", "dora_scale", "magnitude" or a LyCORIS part.

    `path` is the layer as the file names it, which PEFT's patterns mean.
    """

    part: str
    layer: str
    role: str
    path: str


def places(
    infos: Mapping[str, TensorInfo], layers: Mapping[str, Collection[str]], source: str
) -> dict[str, Place]:
    """Returns what every tensor of a LoRA file is.

    `layers` are the paths of all layers of "unet", "text_encoder" and "text_encoder_2"; kohya's names cannot be
    read without them. Raises InputError, starting with `source`, for names that are no LoRA's, naming the variant
    where they are those of one, and for names of no layer or of several.
    """
    by_name = {part: spellings(part, paths) for part, paths in layers.items()}
    found, strange, wrong = {}, [], []
    for name, info in infos.items():
        read = _role(name) if len(name) <= _MAX_NAME else None
        if read is None:
            strange.append(f"{name} {info.shape}")
            continue
        path, role = read
        flat = _flat(path)
        if flat is None:
            match = _DOTTED.fullmatch(path)
            if match is None:
                strange.append(f"{name} {info.shape}")
                continue
            found[name] = _dotted(match, role)
            continue
        part, layer = flat
        meant = by_name.get(part, {}).get(layer, [])
        if len(meant) == 1:
            found[name] = Place(part, meant[0], role, meant[0])
        else:
            wrong.append(f"{name} is {'both ' + ' and '.join(meant) if meant else 'not there'}")
    if strange:
        variants = sorted({kind for name in strange for kind in _variants(name.split(" ")[0])})
        what = f" (it has {' and '.join(variants)}, which are not supported)" if variants else ""
        raise InputError(
            f"{source} is not a LoRA in the names of diffusers, PEFT, kohya or LyCORIS, in {len(strange)} "
            f"tensors{what}: {listed(strange)}"
        )
    if wrong:
        raise InputError(
            f"{source} names layers unlike the network's in {len(wrong)} tensors{_family(infos)}: {listed(wrong)}"
        )
    return found


def _role(name: str) -> tuple[str, str] | None:
    """Returns the path of the layer and the role; None for a name that is no LoRA's."""
    old = _OF_2023.fullmatch(name)
    if old is not None:
        attention = old["attention"]
        if attention.endswith("self_attn"):  # a text encoder's
            return f"{attention}.{old['to']}_proj", old["role"]
        return f"{attention}.to_{old['to']}{'.0' if old['to'] == 'out' else ''}", old["role"]
    match = _NAME.fullmatch(name)
    return None if match is None else (match["layer"], _ROLES[match["role"]])


def _flat(path: str) -> tuple[str, str] | None:
    """Returns the network and the layer with underscores for dots; None for a path with dots."""
    if path.startswith(_COMFY_PREFIX):
        return "unet", path.removeprefix(_COMFY_PREFIX).replace(".", "_")
    match = _KOHYA.fullmatch(path)
    return None if match is None else (PREFIXES[match["part"]], match["layer"])


def _dotted(match: re.Match, role: str) -> Place:
    layer = match["layer"].replace(".processor.", ".")
    # older files begin with text_model, today's do not
    today = next(iter(tensors_of_file({layer: None})), layer)
    # PEFT names no network; CLIP's layers are told by their first word.
    part = match["part"] or ("text_encoder" if today.startswith("text_model.") else "unet")
    return Place(part, today if part != "unet" else layer, role, layer)


def _variants(name: str) -> list[str]:
    return [kind for end, kind in _VARIANTS.items() if re.search(f"(?:{end})$", name)]


def _family(infos: Mapping[str, TensorInfo]) -> str:
    read = {name: _role(name) for name in infos if len(name) <= _MAX_NAME}
    found = family({one[0]: infos[name].shape for name, one in read.items() if one and one[1] == "down"})
    return f" (its shapes are those of {found})" if found else ""


def family(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns which models a UNet's layers are of, by what their cross-attention reads; None where it is not known.

    `shapes` are those of weights or of the factors `down`, in PyTorch's axes, by the layers' paths.
    """
    cross = {path: shape for path, shape in shapes.items() if _CROSS.fullmatch(path) and len(shape) > 1}
    known = {_FAMILIES[shape[1]] for shape in cross.values() if shape[1] in _FAMILIES}
    return known.pop() if len(known) == 1 else None
