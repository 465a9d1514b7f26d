"""Why noise schedules of other kinds than the betas of DDPM are refused."""

from collections.abc import Collection, Mapping
from typing import Any

_FLOW = "flow matching: x_t is (1 - t) x0 + t epsilon there, and its networks predict neither epsilon nor v"
_SIGMAS = "EDM's sigmas: its networks are given scaled inputs and sigmas, not timesteps of betas"
# Why other classes of diffusers, and what other schedulers ask of a network, are refused; the first part that fits.
_CLASSES = {
    "Flow": _FLOW, "Piflow": _FLOW, "Helios": _FLOW, "LTX": _FLOW, "MiniMax": _FLOW,
    "EDM": _SIGMAS, "CMStochastic": _SIGMAS, "CosineDPM": _SIGMAS, "ScoreSde": _SIGMAS, "SCM": _SIGMAS,
    "IPNDM": "a schedule without betas", "CogVideoX": "betas that are shifted by snr_shift_scale",
    "RePaint": "inpainting by resampling", "UnCLIP": "a prior's schedule",
    "Consistency": "a consistency decoder's schedule",
}  # fmt: skip
_PREDICTIONS = {
    "sample": "such a network gives x0 itself",
    "flow_prediction": _FLOW,
    "trigflow": _SIGMAS,
}


def why_refused(
    values: Mapping[str, Any], classes: Collection[str], predictions: Collection[str]
) -> str | None:
    """Returns why the numbers of a scheduler_config.json mean something else than here; None where they do not.

    `classes` and `predictions` are those that are supported.
    """
    name = values.get("_class_name")
    prediction = values.get("prediction_type")
    for part, reason in _CLASSES.items():
        if isinstance(name, str) and name not in classes and part in name:
            return f"_class_name={name!r} is not supported ({reason}); supported: {', '.join(classes)}"
    if isinstance(prediction, str) and prediction in _PREDICTIONS:
        return (
            f"prediction_type={prediction!r} is not supported ({_PREDICTIONS[prediction]}); supported: "
            f"{', '.join(predictions)}"
        )
    if values.get("use_flow_sigmas") is True:
        return f"use_flow_sigmas=True is not supported ({_FLOW})"
    return None
