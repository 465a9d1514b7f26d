"""Weighted sums of UNets, as SwiftBrush v2 joins its two trainings."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sbv2_jax.convert.model import Model, require_alike, save_model
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.errors import InputError, listed
from sbv2_jax.models.config import ModelConfig

# A UNet may be used at another size than it was made for.
_MAY_DIFFER = ("sample_size", "upcast_attention")
_SCHEDULE = (
    "prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "rescale_betas_zero_snr", "timesteps",
)  # fmt: skip


def weighted_sum(
    params: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]
) -> dict[str, np.ndarray]:
    """Returns sum_i weights_i * params_i, added in float32 from the left, in the widest of the inputs' types.

    Source: SwiftBrush v2 (Dao et al., 2024), lam * theta_full + (1 - lam) * theta_lora.
    """
    merged = {}
    for name, first in params[0].items():
        total = np.zeros(first.shape, np.float32)
        for one, weight in zip(params, weights, strict=True):
            total = total + np.float32(weight) * one[name].astype(np.float32)
        dtype = first.dtype
        for one in params[1:]:
            dtype = jnp.promote_types(dtype, one[name].dtype)
        with np.errstate(over="ignore"):  # what is too large for the type is refused when it is written
            merged[name] = total.astype(dtype)
    return merged


def merge_models(
    models: Sequence[Model], weights: Sequence[float], out: str | Path, *, dtype: Any | None = None
) -> None:
    """Writes the first model with the weighted sum of the UNets of all; `dtype` as for `save_model`.

    Raises InputError as `merged` does; nothing is written then.
    """
    save_model(out, models[0], merged(models, weights), dtype=dtype)


def merged(models: Sequence[Model], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """Returns the weighted sum of the UNets of models.

    Raises InputError for weights that do not sum to 1, and as `require_mergeable` does.
    """
    if len(models) < 2 or len(models) != len(weights):
        raise InputError(
            f"a merge takes two models or more and one weight for each: {len(models)} and {len(weights)}"
        )
    if not abs(math.fsum(weights) - 1) <= 1e-6:
        raise InputError(f"the weights {', '.join(f'{one:g}' for one in weights)} do not sum to 1")
    require_mergeable(models)
    return weighted_sum([model.unet.params for model in models], weights)


def require_mergeable(models: Sequence[Model]) -> None:
    """Raises InputError, listing every difference, for UNets of other shapes or settings, or of other schedules."""
    first, *others = models
    for other in others:
        require_alike(first, other)
        names = f"{other.name} and {first.name}"
        _require_equal(_settings(first.unet.config), _settings(other.unet.config), names)
    # A UNet on its own says nothing of its schedule.
    schedules = [_schedule(model.scheduler, model.name) for model in models if model.scheduler is not None]
    for schedule in schedules[1:]:
        _require_equal(schedules[0], schedule, "the pipelines' schedules")


def _settings(config: ModelConfig) -> dict[str, object]:
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in _MAY_DIFFER}


def _schedule(scheduler: Mapping[str, Any], name: str) -> dict[str, object]:
    config = ScheduleConfig.from_dict(dict(scheduler), name)
    return {name: getattr(config, name) for name in _SCHEDULE}


def _require_equal(first: Mapping[str, object], other: Mapping[str, object], what: str) -> None:
    differ = [
        f"{name} is {first[name]!r} and {other[name]!r}" for name in first if first[name] != other[name]
    ]
    if differ:
        raise InputError(f"{what} differ: {listed(differ)}")
