"""The strict configuration of a distillation run: its defaults, its checks, and what must agree.

Nothing here imports jax: a bad field is an error before any device is touched.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from sbv2_jax.errors import InputError
from sbv2_jax.fields import build, check_fields, words
from sbv2_jax.run.config_fields import FIELDS

# Fields that a resumed run may change freely: they alter no number of a step by more than rounding.
_MAY_CHANGE = (
    "accumulate",
    "architecture",
    "attention",
    "checkpoint",
    "clip.passes",
    "evaluate",
    "limits",
    "mesh",
    "programs",
    "remat",
    "sample",
    "student.lora.init",
    "wandb",
)
# Fields, and groups of them, that there have not always been: a run before them did what their defaults say, so that
# its checkpoints go on.
_NEW = (
    "clip.schedule",
    "gan",
    "pairs",
    "prompts_column",
    "reward",
    "score.weighting",
    "student.timesteps",
    "terms",
)
FORMER = {
    name: list(field.default) if isinstance(field.default, tuple) else field.default
    for name, field in FIELDS.items()
    if name in _NEW or name.partition(".")[0] in _NEW
}


def default_config() -> ConfigDict:
    """Returns the paper's full training, locked; what the paper leaves open is said by a config file."""
    return build(FIELDS)


def stable_diffusion_21(argument: str, machine: Mapping[str, Any]) -> ConfigDict:
    """Returns the paper's main run on a machine: SD 2.1 base at 512 px, from SD-Turbo.

    `argument` is a config file's: "lora" is the second training, a LoRA with the CLIP loss (the first one trains
    all weights), "v1" SwiftBrush v1 and "regression" a training on pairs alone, starts from the teacher for where there
    is no SD-Turbo, "runlocal" shrinks any to a minute on a laptop; they are joined by commas. `machine` holds
    the fields that fit the run to it. The directories are where a user is expected to put the checkpoints, of which
    docs/checkpoints.md says the sources; a hub id may stand for each.
    """
    chosen = words(argument, "lora", "v1", "regression", "runlocal")
    config = default_config()
    config.teacher = "./checkpoints/stable-diffusion-2-1-base"
    config.architecture = "sd21-base"
    config.resolution = 512
    config.student.init = "./checkpoints/sd-turbo"
    config.prompts = "data/prompts.txt"
    config.precision = "bfloat16"
    config.remat = "block"
    config.programs = "stages"  # a third of the memory, and less time, to compile than as one program
    if "lora" in chosen:
        config.student.mode = "lora"
        config.clip.model = "./checkpoints/openclip-vit-b-32"
        config.clip.decoder = "./checkpoints/taesd"
        config.clip.weight = 0.1
    if "v1" in chosen:
        swiftbrush_v1(config)
        config.steps = 16_000  # its 4.1 A100-days (SwiftBrush v2, table 8) at its 2.93 images/s
        config.score.alpha = 108.0
    if "regression" in chosen:
        config.student.init = "teacher"
        config.steps = 10_000
        config.student.lr = 1e-5
        regress(config)
    config.update_from_flattened_dict(machine)
    if "runlocal" in chosen:
        shrink(config)
    return config


def swiftbrush_v1(config: ConfigDict) -> None:
    """Makes a run, in place, one of SwiftBrush v1, a start for any teacher (SwiftBrush v2, sections 4.2 and 7.3).

    It is the VSD loss alone, by SwiftBrush's weight, on all weights of the student, which are the teacher's at first;
    its published code has no weight decay.
    """
    config.terms = ("vsd",)
    config.student.update(init="teacher", mode="full")
    config.vsd.weighting = "sbv2"
    config.optimizer.weight_decay = 0.0
    config.clip.update(model="", weight=0.0)
    config.reward.update(model="", weight=0.0)


def regress(config: ConfigDict) -> None:
    """Makes a run, in place, one of the regression on pairs alone, which is a start for any teacher; no score model."""
    config.terms = ("regression",)
    config.pairs.update(path="runs/pairs", share=1.0, weight=1.0)
    config.clip.update(model="", weight=0.0)
    config.reward.update(model="", weight=0.0)


def shrink(config: ConfigDict) -> None:
    """Shrinks a run, in place, to a minute on a laptop: the bundled pipeline, a few steps, one device."""
    config.update(steps=10, batch_size=8, accumulate=1, precision="float32", remat="none", programs="one")
    config.update(teacher="bundled", prompts="openmoji", prompts_column="", architecture="", resolution=0)
    config.student.init = "teacher"
    config.student.lora.update(rank=4, alpha=8.0)
    config.score.update(rank=4, alpha=8.0)
    config.clip.model = "bundled" if config.clip.model else ""
    config.clip.decoder = "vae_tiny"
    config.optimizer.warmup = 0
    config.reward.model = "bundled" if config.reward.model else ""
    config.clip.passes = 1
    config.mesh.update(replica=1, data=-1, fsdp=1)
    config.checkpoint.every = 5
    config.sample.every = 5


def validate(config: ConfigDict) -> None:
    """Checks every field of a distillation run and every pair that must agree.

    Raises InputError, naming the field, for an unknown or missing one, a wrong type or range, and a conflict.
    """
    check_fields(config, FIELDS)
    for wrong, message in _conflicts(config):
        if wrong:
            raise InputError(message)


def may_change(config: ConfigDict) -> tuple[str, ...]:
    """Returns the fields, or groups of them, that a resumed run may change.

    The number of steps is one of them where neither a learning rate nor a weight falls towards the last.
    """
    falls = config.optimizer.schedule == "cosine" or any(
        term.weight > 0 and term.schedule == "linear" for term in (config.clip, config.reward)
    )
    return _MAY_CHANGE if falls else ("steps", *_MAY_CHANGE)


def check_mesh(config: ConfigDict, device_count: int) -> tuple[int, int, int]:
    """Returns the mesh (replica, data, fsdp) for this many devices; data = -1 is what is left, fsdp = -1 counts as 1.

    Raises InputError where the devices cannot form the mesh or the mesh does not divide the batch.
    """
    replica, data, fsdp = config.mesh.replica, config.mesh.data, max(config.mesh.fsdp, 1)
    if data == -1:
        if device_count % (replica * fsdp):
            raise InputError(
                f"config.mesh.replica x config.mesh.fsdp = {replica} x {fsdp} does not divide the {device_count} "
                "devices here"
            )
        data = device_count // (replica * fsdp)
    if replica * data * fsdp != device_count:
        raise InputError(
            f"config.mesh: replica x data x fsdp = {replica} x {data} x {fsdp} needs {replica * data * fsdp} "
            f"devices; there are {device_count}"
        )
    _check_batch(config, device_count)
    return replica, data, fsdp


def planned_devices(config: ConfigDict) -> int:
    """Returns how many devices the mesh of a configuration has at least: -1 counts as 1."""
    return config.mesh.replica * max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)


def _check_batch(config: ConfigDict, devices: int) -> None:
    if config.batch_size % (config.accumulate * devices):
        raise InputError(
            f"config.batch_size = {config.batch_size} is not a multiple of "
            f"config.accumulate x devices of config.mesh = {config.accumulate} x {devices}"
        )


def _conflicts(config: ConfigDict) -> Iterable[tuple[bool, str]]:
    vsd, clip, optimizer = config.vsd, config.clip, config.optimizer
    yield (
        vsd.t_min >= vsd.t_max,
        f"config.vsd.t_min = {vsd.t_min} must be below config.vsd.t_max = {vsd.t_max}",
    )
    for name in ("clip", "reward"):
        own = config[name]
        yield (
            own.weight > 0 and not own.model,
            f"config.{name}.weight = {own.weight:g} needs a config.{name}.model",
        )
        yield (
            own.weight > 0 and name not in config.terms,
            f"config.{name}.weight = {own.weight:g} needs {name!r} in config.terms",
        )
    groups = {"vsd": "vsd", "clip": "clip", "reward": "reward", "regression": "pairs", "gan": "gan"}
    weighted = [groups[term] for term in config.terms if term in groups]
    yield (
        len(weighted) == len(config.terms) and not any(config[name].weight for name in weighted),
        f"{' and '.join(f'config.{name}.weight' for name in weighted)} are 0: nothing trains the student",
    )
    yield (
        "regression" in config.terms and not config.pairs.path,
        "config.terms has 'regression', which needs a config.pairs.path: launch/pairs.py makes the pairs",
    )
    yield (
        "gan" in config.terms and not config.gan.path,
        "config.terms has 'gan', which needs a config.gan.path: launch/latents.py makes the latents of real pictures",
    )
    yield (
        config.gan.path != "" and "gan" not in config.terms,
        f"config.gan.path = {config.gan.path!r} needs 'gan' in config.terms",
    )
    yield (
        "regression" in config.terms and len(config.student.timesteps) > 1,
        f"config.student.timesteps = {config.student.timesteps!r} does not go with 'regression' in config.terms: "
        "its pairs are of one step",
    )
    yield (
        config.pairs.path != "" and "regression" not in config.terms,
        f"config.pairs.path = {config.pairs.path!r} needs 'regression' in config.terms",
    )
    yield (
        config.student.lora.init != "" and config.student.mode != "lora",
        f"config.student.lora.init = {config.student.lora.init!r} needs config.student.mode = 'lora'",
    )
    yield (
        (clip.model != "" or config.reward.model != "")
        and config.batch_size % (config.accumulate * planned_devices(config) * clip.passes) != 0,
        f"config.clip.passes = {clip.passes} does not divide the {config.batch_size // config.accumulate} images "
        f"of a pass over {planned_devices(config)} device(s)",
    )
    yield (
        optimizer.warmup >= config.steps,
        f"config.optimizer.warmup = {optimizer.warmup} must be below config.steps = {config.steps}",
    )
    yield (
        config.sample.every > 0 and not config.sample.prompts,
        f"config.sample.every = {config.sample.every} needs config.sample.prompts",
    )
    yield (
        config.evaluate.every > 0 and not config.evaluate.protocol,
        f"config.evaluate.every = {config.evaluate.every} needs config.evaluate.protocol",
    )
    yield (
        config.evaluate.export == "best" and not (config.evaluate.every and config.evaluate.best),
        "config.evaluate.export = 'best' needs config.evaluate.every and config.evaluate.best",
    )
    _check_batch(config, planned_devices(config))
