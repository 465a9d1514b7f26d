"""The scheduler_config.json files that Stable Diffusion is published with."""

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD_15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **STABLE_DIFFUSION}
SD_21 = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    **STABLE_DIFFUSION,
    "prediction_type": "v_prediction",
}
SD_TURBO = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    **STABLE_DIFFUSION,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "trailing",
    "use_karras_sigmas": False,
}
