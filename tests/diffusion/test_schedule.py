"""The schedule against diffusers' for every scheduler class, the conversions, and what is refused."""

import dataclasses
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from published_schedules import SD_15, SD_21, SD_TURBO, STABLE_DIFFUSION

from sbv2_jax.diffusion.schedule import (
    ScheduleConfig,
    add_noise,
    classifier_free_guidance,
    epsilon_to_x0,
    make_schedule,
    to_epsilon,
    to_x0,
    v_to_epsilon,
    v_to_x0,
    x0_to_v,
)
from sbv2_jax.errors import InputError

SD_21_BASE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.10.0.dev0",
    **STABLE_DIFFUSION,
    "prediction_type": "epsilon",
}
FILES = {"sd15": SD_15, "sd21": SD_21, "sd21_base": SD_21_BASE, "sd_turbo": SD_TURBO}
# diffusers loads the SDE one with torchsde alone; its betas are those of KDPM2.
CLASSES = [name for name in ScheduleConfig.CLASSES if name != "DPMSolverSDEScheduler"]


def schedule_of(values):
    return make_schedule(ScheduleConfig.from_dict(values))


def batch(rng, t, shape=(4, 4, 4)):
    t = np.asarray(t, np.int32)
    x = [jnp.asarray(rng.standard_normal((len(t), *shape)), jnp.float32) for _ in range(3)]
    return *x, jnp.asarray(t)


@pytest.mark.parametrize("name", FILES)
def test_real_files_give_the_schedule_of_diffusers(name):
    values = FILES[name]
    theirs = getattr(diffusers, values["_class_name"]).from_config(values).alphas_cumprod.double().numpy()
    ours = schedule_of(values)
    assert ours.alpha.dtype == ours.sigma.dtype == np.float32
    assert np.abs(ours.alpha.astype(np.float64) ** 2 - theirs).max() < 1e-6
    assert np.abs(ours.sigma.astype(np.float64) ** 2 - (1 - theirs)).max() < 1e-6
    assert ours.prediction_type == values.get("prediction_type", "epsilon")
    assert (ours.timestep_spacing, ours.steps_offset) == (values.get("timestep_spacing"), 1)
    assert not ours.set_alpha_to_one


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 100},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.15, 0.2, 0.5], "num_train_timesteps": 4},
    ],
    ids=["defaults", "scaled_linear", "cosine", "trained"],
)
def test_every_class_and_beta_schedule(class_name, values, tmp_path):
    """The file as diffusers writes it, with every default of the class spelled out, and the bare one."""
    scheduler = getattr(diffusers, class_name)(**values)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    for file in (written, {"_class_name": class_name, **values}):
        abar = ScheduleConfig.from_dict(file).alphas_cumprod()
        assert np.abs(abar - scheduler.alphas_cumprod.double().numpy()).max() < 1e-6


@pytest.mark.parametrize(
    "class_name",
    [
        name
        for name in CLASSES
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, name)).parameters
    ],
)
def test_zero_terminal_signal(class_name):
    values = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    theirs = getattr(diffusers, class_name)(**values).alphas_cumprod.double().numpy()
    schedule = schedule_of({"_class_name": class_name, **values})
    assert np.abs(schedule.alpha.astype(np.float64) ** 2 - theirs).max() < 1e-6
    assert schedule.alpha[-1] == 0 and schedule.sigma[-1] == 1
    v = jnp.ones((1, 2))
    assert (to_x0(schedule, v, 3 * v, jnp.array([999], jnp.int32)) == -v).all()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"beta_end": 0.02, "beta_edn": 0.02, "betas": []}, ["beta_edn", "betas", "unknown"]),
        ({"prediction_type": "sample"}, ["prediction_type", "sample", "v_prediction"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid"]),
        ({"timestep_spacing": "middle"}, ["timestep_spacing"]),
        ({"timestep_type": "continuous"}, ["timestep_type"]),
        ({"use_flow_sigmas": True}, ["use_flow_sigmas"]),
        ({"variance_type": "learned"}, ["variance_type"]),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["_class_name", "DDIMScheduler"]),
        ({"_class_name": None}, ["_class_name"]),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, ["flow matching"]),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, ["EDM's sigmas"]),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, ["flow matching"]),
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, ["snr_shift_scale"]),
        ({"_class_name": "IPNDMScheduler"}, ["without betas"]),
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, ["x0 itself"]),
        ({"shift": 3.0}, ["unknown field shift=3.0"]),
        ({"beta_start": 0.02, "beta_end": 0.01}, ["beta_start"]),
        ({"beta_start": "0.01"}, ["scheduler_config.json"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps"]),
        ({"num_train_timesteps": 1000.5}, ["num_train_timesteps"]),
        ({"trained_betas": 5}, ["scheduler_config.json"]),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}, ["trained_betas"]),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 1.2]}, ["trained_betas"]),
        ({"set_alpha_to_one": None}, ["set_alpha_to_one"]),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "epsilon"]),
    ],
)
def test_bad_files_are_refused_in_one_line(values, names):
    with pytest.raises(InputError) as error:
        ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", **values})
    message = str(error.value)
    assert message.startswith("scheduler_config.json: ") and "\n" not in message
    assert all(name in message for name in names), message


def test_ignored_fields_exist_in_diffusers():
    """No field is ignored by a misspelt name: all are arguments of one of diffusers' schedulers."""
    schedulers = [getattr(diffusers, name) for name in (*CLASSES, "UniPCMultistepScheduler")]
    arguments = {name for scheduler in schedulers for name in scheduler._get_init_keys(scheduler)}
    # diffusers has no place for the timesteps of a student.
    fields = {field.name for field in dataclasses.fields(ScheduleConfig)} - {"timesteps"}
    # The last is the SDE solver's, which is not listed without torchsde.
    assert ScheduleConfig.IGNORED | fields <= arguments | {"predict_epsilon", "noise_sampler_seed"}
    assert not ScheduleConfig.IGNORED & (fields | set(ScheduleConfig.FIXED))


def test_add_noise_and_velocity_equal_diffusers(rng):
    import torch

    scheduler = diffusers.DDIMScheduler.from_config(SD_21)
    x0, noise, _, t = batch(rng, [0, 1, 500, 999])
    x0_torch, noise_torch = torch.tensor(np.asarray(x0)), torch.tensor(np.asarray(noise))
    t_torch = torch.tensor(np.asarray(t)).long()
    schedule = schedule_of(SD_21)
    x_t = jax.jit(add_noise)(schedule, x0, noise, t)
    assert relative_error(x_t, scheduler.add_noise(x0_torch, noise_torch, t_torch)) < 1e-5
    velocity = scheduler.get_velocity(x0_torch, noise_torch, t_torch)
    assert relative_error(x0_to_v(schedule, x0, x_t, t), velocity) < 1e-5


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    t=st.lists(st.integers(0, 999), min_size=3, max_size=3),
    shape=st.sampled_from([(), (2, 3, 4)]),
    kind=st.sampled_from([SD_15, SD_21]),
)
def test_conversions_agree_with_the_definitions(seed, t, shape, kind):
    """x_t and v by definition from x0 and epsilon; every conversion returns the one of the three it names."""
    schedule = schedule_of(kind)
    x0, noise, _, t = batch(np.random.default_rng(seed), t, shape)
    x_t = add_noise(schedule, x0, noise, t)
    a, s = (jnp.asarray(c)[t].reshape(-1, *(1,) * len(shape)) for c in (schedule.alpha, schedule.sigma))
    v = a * noise - s * x0
    # The error of x_t, half a unit in its last place, grows by the factor that the conversion divides by.
    unit = 1e-6 * (1 + float(jnp.abs(x_t).max() + jnp.abs(v).max()))
    for ours, exact, divisor in (
        (epsilon_to_x0(schedule, noise, x_t, t), x0, a),
        (x0_to_v(schedule, x0, x_t, t), v, s),
        (v_to_epsilon(schedule, v, x_t, t), noise, 1.0),
        (v_to_x0(schedule, v, x_t, t), x0, 1.0),
    ):
        assert (jnp.abs(ours - exact) * divisor).max() < unit

    output = noise if schedule.prediction_type == "epsilon" else v
    assert (jnp.abs(to_x0(schedule, output, x_t, t) - x0) * a).max() < unit
    assert jnp.abs(to_epsilon(schedule, output, x_t, t) - noise).max() < unit


@pytest.mark.parametrize("kind", [SD_15, SD_21], ids=["epsilon", "v"])
def test_both_weightings_are_one_gradient(kind, rng):
    """s_t^2 (eps_T - eps_S) = s_t a_t (x0_S - x0_T), whatever the two networks put out."""
    schedule = schedule_of(kind)
    x_t, teacher, score, t = batch(rng, [20, 250, 700, 980])
    a, s = (jnp.asarray(c)[t].reshape(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
    in_epsilon = s**2 * (to_epsilon(schedule, teacher, x_t, t) - to_epsilon(schedule, score, x_t, t))
    in_x0 = s * a * (to_x0(schedule, score, x_t, t) - to_x0(schedule, teacher, x_t, t))
    assert relative_error(in_epsilon, in_x0) < 1e-5


def test_guidance(rng):
    conditional, unconditional, _, _ = batch(rng, [0, 0])
    for scale in (1.0, 4.5, jnp.float32(4.5)):
        expected = np.asarray(unconditional) + float(scale) * np.asarray(conditional - unconditional)
        assert relative_error(classifier_free_guidance(conditional, unconditional, scale), expected) < 1e-6
    each = classifier_free_guidance(conditional, unconditional, jnp.array([1.0, 3.0]))
    assert relative_error(each[0], conditional[0]) < 1e-6
    assert relative_error(each[1], classifier_free_guidance(conditional, unconditional, 3.0)[1]) < 1e-6


def test_only_float32_and_int32_are_taken(rng):
    schedule = schedule_of(SD_15)
    x, y, _, t = batch(rng, [3, 7])
    for function in (
        add_noise,
        epsilon_to_x0,
        x0_to_v,
        v_to_epsilon,
        v_to_x0,
        to_epsilon,
        to_x0,
    ):
        for wrong in (jnp.bfloat16, jnp.float16):
            with pytest.raises(TypeError, match=jnp.dtype(wrong).name):
                function(schedule, x.astype(wrong), y, t)
            with pytest.raises(TypeError, match=jnp.dtype(wrong).name):
                jax.jit(function)(schedule, x, y.astype(wrong), t)
        with pytest.raises(TypeError, match="int32, got float32"):
            function(schedule, x, y, t.astype(jnp.float32))
        with pytest.raises(ValueError, match="timesteps of shape"):
            function(schedule, x, y, t[:1])
        with pytest.raises(ValueError, match="one shape"):
            function(schedule, x, y[:1], t)
    with pytest.raises(TypeError, match="bfloat16"):
        classifier_free_guidance(x, y.astype(jnp.bfloat16), 2.0)
    with pytest.raises(TypeError, match="bfloat16"):
        add_noise(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), schedule), x, y, t)


def test_a_timestep_outside_the_range_is_nan_not_clamped(rng):
    x, y, _, t = batch(rng, [-1, 0, 999, 1000])
    noisy = jax.jit(add_noise)(schedule_of(SD_15), x, y, t)
    assert jnp.isnan(noisy).all(axis=(1, 2, 3)).tolist() == [True, False, False, True]


def test_schedule_is_a_pytree_of_two_host_arrays():
    schedule = schedule_of(SD_TURBO)
    leaves = jax.tree.leaves(schedule)
    assert [type(leaf) for leaf in leaves] == [np.ndarray, np.ndarray]
    again = jax.jit(lambda s: s)(schedule)
    assert again.prediction_type == "epsilon" and again.timestep_spacing == "trailing"
    assert again.num_timesteps == 1000 and (np.asarray(again.alpha) == schedule.alpha).all()


@pytest.mark.parametrize("extra", [{"next_years": None}, {"next_years": False}])
def test_a_field_that_changes_nothing_is_no_error(extra):
    assert ScheduleConfig.from_dict(SD_15 | extra) == ScheduleConfig.from_dict(SD_15)


def test_whole_numbers_may_be_written_as_any_number():
    """As JSON writers of other languages do."""
    values = SD_15 | {"num_train_timesteps": 1000.0, "steps_offset": 1.0}
    config = ScheduleConfig.from_dict(values)
    assert config == ScheduleConfig.from_dict(SD_15) and type(config.num_train_timesteps) is int
    assert make_schedule(config).alpha.shape == (1000,)


def test_the_sde_solver_has_the_betas_of_the_other_solvers_of_its_author():
    one, other = ({"_class_name": f"{name}Scheduler"} for name in ("DPMSolverSDE", "KDPM2Discrete"))
    assert ScheduleConfig.from_dict(one) == ScheduleConfig.from_dict(other)
    assert ScheduleConfig.from_dict(one | {"noise_sampler_seed": 3}).beta_start == 0.00085
