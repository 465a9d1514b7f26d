"""Names of tensors in files that older versions of diffusers and transformers wrote."""

import functools
import re
from collections.abc import Iterable

from absl import logging

from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.clip import tensors_of_file, without_influence

# diffusers before 0.12; the checkpoints of SD 1.x and 2.x still carry these names.
_VAE_ATTENTION = re.compile(r"((?:en|de)coder\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(\w+)")
# What training alone reads.
_TRAINING = {("Dinov2Model", "embeddings.mask_token")}
_VAE_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_names(class_name: str, names: Iterable[str], source: str) -> dict[str, str]:
    """Maps every name of a file that is a parameter's to the name that it has today.

    What is left out is known to be no parameter (CLIP's `position_ids`) or to change nothing of this network; the
    latter is told once in the log.
    Raises InputError, starting with `source`, for two names of the file that mean the same parameter.
    """
    renamed: dict[str, str] = {}
    unused = []
    for name in names:
        if without_influence(class_name, name) or (class_name, name) in _TRAINING:
            unused.append(name)
            continue
        if class_name.startswith("CLIP"):
            today = next(iter(tensors_of_file({name: None})), None)
        elif class_name == "AutoencoderKL" and (match := _VAE_ATTENTION.fullmatch(name)):
            today = f"{match[1]}.{_VAE_LAYERS[match[2]]}.{match[3]}"
        else:
            today = name
        if today is not None:
            renamed[name] = today
    if unused:
        _tell(
            f"{source}: {len(unused)} tensors that a {class_name} does not use are left out: {listed(unused, ', ')}"
        )
    first: dict[str, str] = {}
    twice = [f"{first[new]} and {old}" for old, new in renamed.items() if first.setdefault(new, old) != old]
    if twice:
        raise InputError(f"{source} holds parameters under two names each: {listed(twice)}")
    return renamed


def current_shape(class_name: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape a tensor has today, by its name in the file.

    The VAE's attention was a 1x1 convolution in the original code: [c, c, 1, 1] for today's [c, c].
    """
    old = class_name == "AutoencoderKL" and _VAE_ATTENTION.fullmatch(name)
    return shape[:2] if old and len(shape) == 4 and shape[2:] == (1, 1) else shape


@functools.cache
def _tell(message: str) -> None:
    # Headers are read more than once on the way to a run.
    logging.warning(message)
