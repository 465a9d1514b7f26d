"""What is said of a LoRA beside its tensors, by the names of PEFT's configurations: adapter_config.json, metadata."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sbv2_jax.errors import InputError, listed

_KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_READ = {
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "init_lora_weights", "target_modules",
}  # fmt: skip
# What matters in training alone, chose the layers, or, as fan_in_fan_out, has no effect on dense layers and
# convolutions in PEFT itself.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "fan_in_fan_out", "exclude_modules",
    "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying", "decompose_both",
    "decompose_factor", "use_effective_conv2d", "init_weights",
}  # fmt: skip
# Others change the weights that the update belongs on.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_MAX_PATTERN = 200


class Settings(NamedTuple):
    """The values of one network's LoRA, and where they stand, for messages."""

    source: str
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.values.get("peft_type") or "LORA"

    @property
    def dora(self) -> bool:
        return bool(self.values.get("use_dora"))


def check(settings: Settings) -> None:
    """Raises InputError for a setting that changes what the tensors mean and is not supported."""
    source, values = settings
    if settings.kind not in tuple(_KINDS):  # of any type
        raise InputError(f"{source}: peft_type {settings.kind!r} is not supported (only {', '.join(_KINDS)})")
    wrong = [name for name, value in values.items() if value and name not in _READ and name not in _FREE]
    if values.get("bias") not in (None, "none"):
        wrong.append("bias")
    start = values.get("init_lora_weights")
    if not any(start is one or (isinstance(one, str) and start == one) for one in _STARTS):
        wrong.append("init_lora_weights")
    if wrong:
        text = listed([f"{name}={str(values[name])[:40]!r}" for name in wrong], ", ")
        raise InputError(f"{source} has settings that are not supported: {text}")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(values.get(name), bool | None):
            raise InputError(f"{source}: {name} is {values[name]!r}, neither true nor false")


def scales(settings: Settings, paths: Mapping[str, str], ranks: Mapping[str, int | None]) -> dict[str, float]:
    """Returns the strength of every layer, alpha / r, or alpha / sqrt(r) where it is rank-stabilised.

    `paths` are the layers' names in the file, which a pattern means as PEFT means it: a regular expression for
    the end of the path. `ranks` are those of the tensors, None for no rank.
    Raises InputError, listing the layers, where the ranks differ or a layer is not among the target modules.
    """
    source, values = settings
    rank_of, alpha_of = (
        _setting(settings, name, kind) for name, kind in (("r", "rank"), (_KINDS[settings.kind], "alpha"))
    )
    targets = values.get("target_modules")
    found, wrong, strangers = {}, [], []
    for layer, path in paths.items():
        rank, alpha = rank_of(path), alpha_of(path)
        if rank < 1 or (ranks[layer] is not None and ranks[layer] != rank):
            wrong.append(f"{layer} has {ranks[layer]}, not {rank:g}")
        elif isinstance(targets, list) and not _is_target(path, targets):
            strangers.append(layer)
        else:
            found[layer] = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    if wrong:
        raise InputError(f"{source} says other ranks than the tensors have: {listed(wrong)}")
    if strangers:
        raise InputError(f"{source}: its target_modules do not name {listed(strangers, ', ')}")
    return found


def _is_target(path: str, targets: list[Any]) -> bool:
    names = _forms(path)
    return any(name == one or name.endswith(f".{one}") for name in names for one in targets)


def _forms(path: str) -> tuple[str, ...]:
    # CLIP's layers began with text_model in transformers 4
    bare = path.removeprefix("text_model.")
    return (bare, f"text_model.{bare}") if bare.startswith("encoder.") else (path,)


def _setting(settings: Settings, name: str, kind: str) -> Callable[[str], float]:
    """Returns what gives the rank or the alpha of a layer by its path."""
    source, values = settings
    patterns = values.get(f"{kind}_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise InputError(f"{source}: {kind}_pattern is {str(patterns)[:80]!r}")
    compiled = [(_compile(source, f"{kind}_pattern", text), value) for text, value in patterns.items()]

    def one(path: str) -> float:
        for pattern, value in compiled:
            if any(pattern.match(form) for form in _forms(path)):
                return _number(f"{source}: {kind}_pattern", value)
        return _number(f"{source}: {name}", values.get(name))

    return one


def _compile(source: str, name: str, text: str) -> re.Pattern:
    """Compiles a pattern of PEFT's; refused is one that could take forever: repeated groups, many repetitions."""
    repeated = len(re.findall(r"(?<!\\)[*+{]", text))
    if len(text) <= _MAX_PATTERN and repeated <= 2 and not re.search(r"\)[*+?{]|\\\d", text):
        try:
            return re.compile(rf"(?:.*\.)?(?:{text})$")
        except (re.error, OverflowError, RecursionError):
            pass
    raise InputError(f"{source}: the {name} {text[:80]!r} is not supported")


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise InputError(f"{what} is {str(value)[:80]!r}, not a finite number")
    return float(value)
