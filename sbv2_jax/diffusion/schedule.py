"""The noise schedule x_t = a_t x0 + s_t epsilon, and the conversions between epsilon, x0 and v.

Everything here is float32: at the last timestep a_t is about 0.07, and dividing by it what bfloat16 rounded
leaves one digit of x0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from sbv2_jax.diffusion.few_steps import ORIGINAL_STEPS, check_timesteps
from sbv2_jax.diffusion.file_fields import as_declared, is_neutral
from sbv2_jax.diffusion.other_schedules import why_refused
from sbv2_jax.errors import InputError, listed

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
# Marks the fields that say how pictures are drawn by default, and nothing of what is trained.
OF_PICTURES = {"of_pictures": True}
FEW_STEPS = "LCMScheduler"

_SAMPLER_FIELDS = """
    algorithm_type clip_sample clip_sample_range disable_corrector dynamic_thresholding_ratio euler_at_final
    final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final
    predict_x0 sample_max_value sigma_max sigma_min skip_prk_steps solver_order
    solver_p solver_type thresholding time_shift_type timestep_scaling use_beta_sigmas use_exponential_sigmas
    use_karras_sigmas use_lu_lambdas predictor_order corrector_order tau_func noise_sampler_seed
"""
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What a `scheduler_config.json` says of the noise schedule and of the network's prediction.

    Fields are named as in the file, with the defaults of diffusers. `timestep_spacing`, `steps_offset` and
    `set_alpha_to_one` concern samplers only; a `timestep_spacing` of None is the default of the sampler.
    So do the last two, which an LCMScheduler alone has: its `original_inference_steps`, and the timesteps of a few-step
    student, "_timesteps" in the file, empty where the file does not say them.
    Raises InputError for a value that is not supported.
    """

    CLASSES: ClassVar[tuple[str, ...]] = (
        "PNDMScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LCMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "TCDScheduler",
        "SASolverScheduler",
        "DDIMParallelScheduler",
        "DDIMInverseScheduler",
        "DDPMParallelScheduler",
    )
    # Defaults of a class that differ from those below.
    CLASS_DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "PNDMScheduler": {"set_alpha_to_one": False},
        **dict.fromkeys(
            ("LCMScheduler", "TCDScheduler"), _STABLE_DIFFUSION | {"beta_schedule": "scaled_linear"}
        ),
        **dict.fromkeys(
            (
                "HeunDiscreteScheduler",
                "KDPM2DiscreteScheduler",
                "KDPM2AncestralDiscreteScheduler",
                "DPMSolverSDEScheduler",
            ),
            _STABLE_DIFFUSION,
        ),
    }
    # Fields with a value that would change the schedule, the network's output or the timesteps it is given.
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "predict_epsilon": (True,),
        "timestep_type": ("discrete",),
        "use_dynamic_shifting": (False,),
        "use_flow_sigmas": (False,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    }
    # Fields that only steer the sampler the file was written for.
    IGNORED: ClassVar[frozenset[str]] = frozenset(_SAMPLER_FIELDS.split())

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    timestep_spacing: str | None = None
    original_inference_steps: int | None = dataclasses.field(default=None, metadata=OF_PICTURES)
    timesteps: tuple[int, ...] = dataclasses.field(default=(), metadata=OF_PICTURES)

    def __post_init__(self):
        _require_one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _require_one_of("timestep_spacing", self.timestep_spacing, (*TIMESTEP_SPACINGS, None))
        for name in ("num_train_timesteps", "steps_offset"):
            value = getattr(self, name)
            if not _is_whole(value, 0):
                raise InputError(f"{name}={value!r} is not a whole number")
        if self.num_train_timesteps == 0:
            raise InputError("num_train_timesteps=0: there is nothing to train on")
        if self.original_inference_steps is not None and not _is_whole(self.original_inference_steps, 1):
            raise InputError(
                f"original_inference_steps={self.original_inference_steps!r} is not a whole number >= 1"
            )
        check_timesteps(self.timesteps, self.num_train_timesteps, "_timesteps")
        for name in ("rescale_betas_zero_snr", "set_alpha_to_one"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} is neither true nor false")
        if self.trained_betas is None:
            _require_one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
            if not 0 < self.beta_start <= self.beta_end < 1:
                raise InputError(
                    f"beta_start={self.beta_start!r}, beta_end={self.beta_end!r}: "
                    "expected 0 < beta_start <= beta_end < 1"
                )
        elif len(self.trained_betas) != self.num_train_timesteps:
            raise InputError(
                f"trained_betas has {len(self.trained_betas)} values, num_train_timesteps is "
                f"{self.num_train_timesteps}"
            )
        elif not all(0 < beta < 1 for beta in self.trained_betas):
            raise InputError("trained_betas has values that are not between 0 and 1")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise InputError(
                "rescale_betas_zero_snr=True with prediction_type='epsilon': at the last timestep a_t is 0 "
                "and epsilon says nothing of x0; such a network must predict v"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "scheduler_config.json") -> Self:
        """Builds the configuration from the values of the file of any of the classes in `CLASSES`.

        Raises InputError that names the source and lists every unknown field and unsupported value.
        """
        class_name: Any = values.get("_class_name")
        if reason := why_refused(values, cls.CLASSES, PREDICTION_TYPES):
            raise InputError(f"{source}: {reason}")
        known = {field.name for field in dataclasses.fields(cls) if not field.metadata}
        wrong, ignored = [], cls.IGNORED | {"original_inference_steps"}
        if class_name not in cls.CLASSES:
            wrong.append(f"_class_name={class_name!r} is not supported (one of {', '.join(cls.CLASSES)})")
        if class_name == FEW_STEPS:
            # The others leave it to another sampler of theirs; this one draws by it.
            ignored = ignored - {"clip_sample", "thresholding"}
        for name, value in values.items():
            if name.startswith("_") or name in known or name in ignored:
                continue
            if name not in cls.FIXED:
                if not is_neutral(name, value):
                    wrong.append(f"unknown field {name}={value!r}")
            elif value not in cls.FIXED[name]:
                wrong.append(f"{name}={value!r} is not supported (only {cls.FIXED[name][0]!r})")
        if wrong:
            raise InputError(f"{source}: {listed(wrong)}")
        chosen = {name: values[name] for name in known if name in values}
        if class_name == FEW_STEPS:
            chosen["original_inference_steps"] = values.get("original_inference_steps", ORIGINAL_STEPS)
            chosen["timesteps"] = values.get("_timesteps") or ()
        chosen = as_declared(cls, chosen)
        try:
            if chosen.get("trained_betas") is not None:
                chosen["trained_betas"] = tuple(chosen["trained_betas"])
            return cls(**{**cls.CLASS_DEFAULTS.get(class_name, {}), **chosen})
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: {error}") from error

    def alphas_cumprod(self) -> np.ndarray:
        """Returns abar_t, the signal's share of the variance, float64 [T] (Ho et al., 2020, equation 4)."""
        abar = np.cumprod(1.0 - self._betas())
        if self.rescale_betas_zero_snr:
            # Lin et al., 2023 (Common diffusion noise schedules ... are flawed), algorithm 1.
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return abar

    def _betas(self) -> np.ndarray:
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        # squaredcos_cap_v2: Nichol and Dhariwal, 2021, equation 17, with their clip at 0.999.
        signal = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """A noise schedule and what the network of that schedule predicts; a pytree with two leaves.

    alpha, sigma: float32 [T], sqrt(abar_t) and sqrt(1 - abar_t). The rest is static.
    """

    alpha: jax.Array | np.ndarray
    sigma: jax.Array | np.ndarray
    prediction_type: str = dataclasses.field(metadata={"static": True})
    timestep_spacing: str | None = dataclasses.field(default=None, metadata={"static": True})
    steps_offset: int = dataclasses.field(default=0, metadata={"static": True})
    set_alpha_to_one: bool = dataclasses.field(default=True, metadata={"static": True})
    original_inference_steps: int | None = dataclasses.field(default=None, metadata={"static": True})
    timesteps: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps the network was trained on."""
        return self.alpha.shape[0]


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Computes the schedule in float64 on the host and returns it as float32 NumPy arrays.

    NumPy, so that no device is touched and every process of a mesh passes the same values.
    """
    abar = config.alphas_cumprod()
    return Schedule(
        alpha=np.sqrt(abar).astype(np.float32),
        sigma=np.sqrt(1.0 - abar).astype(np.float32),
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        set_alpha_to_one=config.set_alpha_to_one,
        original_inference_steps=config.original_inference_steps,
        timesteps=config.timesteps,
    )


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns float32 x as a network of that dtype sees it, in float32.

    What the network is given and what its output is converted with must be the same: at the last timestep a
    difference of one rounding is divided by a_t. Not a cast there and back, which XLA may leave out.
    """
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kept.nexp, kept.nmant) if dtype != jnp.float32 else x


def add_noise(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x_t = a_t x0 + s_t noise (Ho et al., 2020, equation 4).

    x0, noise float32 [B, ...]; t int32 [B], a t outside 0..T-1 gives NaN. Raises TypeError for other dtypes.
    """
    a, s = coefficients(schedule, t, x0, noise)
    return a * x0 + s * noise


def epsilon_to_x0(schedule: Schedule, epsilon: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x0 = (x_t - s_t epsilon) / a_t; shapes and errors as in `add_noise`."""
    a, s = coefficients(schedule, t, epsilon, x_t)
    return (x_t - s * epsilon) / a


def x0_to_v(schedule: Schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns v = a_t epsilon - s_t x0 = (a_t x_t - x0) / s_t (Salimans and Ho, 2022, section 4)."""
    a, s = coefficients(schedule, t, x0, x_t)
    return (a * x_t - x0) / s


def v_to_epsilon(schedule: Schedule, v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns epsilon = s_t x_t + a_t v (Salimans and Ho, 2022, section 4)."""
    a, s = coefficients(schedule, t, v, x_t)
    return s * x_t + a * v


def v_to_x0(schedule: Schedule, v: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x0 = a_t x_t - s_t v (Salimans and Ho, 2022, section 4)."""
    a, s = coefficients(schedule, t, v, x_t)
    return a * x_t - s * v


def to_epsilon(schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the epsilon that a network's output means, by `schedule.prediction_type`.

    output, x_t float32 [B, ...]; t int32 [B]. Raises TypeError for other dtypes.
    """
    return _convert(schedule, output, x_t, t, epsilon=_unchanged, v_prediction=v_to_epsilon)


def to_x0(schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the x0 that a network's output means; shapes and errors as in `to_epsilon`."""
    return _convert(schedule, output, x_t, t, epsilon=epsilon_to_x0, v_prediction=v_to_x0)


def ideal_output(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """Returns what a network should say of `add_noise(x0, noise, t)`: the noise, or v = a_t noise - s_t x0.

    Shapes and errors as in `add_noise`. From the noise itself, not from x_t, whose rounding would be divided by s_t.
    """
    a, s = coefficients(schedule, t, x0, noise)
    _require_one_of("prediction_type", schedule.prediction_type, PREDICTION_TYPES)
    return noise if schedule.prediction_type == "epsilon" else a * noise - s * x0


def classifier_free_guidance(
    conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array
) -> jax.Array:
    """Returns unconditional + scale (conditional - unconditional).

    conditional, unconditional float32 [B, ...], both epsilon, both x0 or both v; scale a scalar or [B].
    Ho and Salimans, 2022, equation 6, whose w is scale - 1. Raises TypeError for other dtypes.
    """
    _require_float32(conditional, unconditional)
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim:
        scale = scale.reshape(-1, *(1,) * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)


def is_guided(scale: float | jax.Array) -> bool:
    """Whether classifier-free guidance of this scale changes the network's output: 1 and less are none.

    Turbo models are documented with a guidance of 0 and mean none, where the formula would erase the prompt. A scale
    that is traced is applied whatever it is: who traces it has asked before.
    Source: diffusers' `do_classifier_free_guidance`, and `predict_noise` of DMD2 (Yin et al., 2024).
    """
    return isinstance(scale, jax.core.Tracer) or bool(scale > 1)


def coefficients(schedule: Schedule, t: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a_t and s_t, float32 [B, 1, ...], to multiply these arrays of one shape [B, ...] with.

    Raises TypeError unless the arrays are float32 and t is int32, ValueError unless t is [B] and the arrays
    have one shape.
    """
    _require_float32(schedule.alpha, schedule.sigma, *arrays)
    if t.dtype != jnp.int32:
        raise TypeError(f"timesteps must be int32, got {t.dtype}")
    shape = arrays[0].shape
    if any(array.shape != shape for array in arrays):
        raise ValueError(f"arrays of one shape expected, got {[array.shape for array in arrays]}")
    if t.shape != shape[:1]:
        raise ValueError(f"timesteps of shape {shape[:1]} expected, got {t.shape}")

    def gather(values: jax.Array | np.ndarray) -> jax.Array:
        # NaN outside the range: JAX would clamp the index and go on with a wrong coefficient.
        taken = jnp.asarray(values).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return taken.reshape(-1, *(1,) * (len(shape) - 1))

    return gather(schedule.alpha), gather(schedule.sigma)


def _convert(
    schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array, **by_type: Callable[..., jax.Array]
) -> jax.Array:
    _require_one_of("prediction_type", schedule.prediction_type, PREDICTION_TYPES)
    return by_type[schedule.prediction_type](schedule, output, x_t, t)


def _unchanged(schedule: Schedule, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    coefficients(schedule, t, output, x_t)  # the same strictness whatever the network predicts
    return output


def _require_float32(*arrays: jax.Array | np.ndarray) -> None:
    for array in arrays:
        if array.dtype != jnp.float32:
            raise TypeError(f"schedule arithmetic is float32 only, got {array.dtype}: cast it explicitly")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r} is not supported (one of {', '.join(map(repr, allowed))})")
