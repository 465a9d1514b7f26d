"""The strict configuration of a distillation run: defaults, what each field may hold, and what must agree.

Nothing here imports jax: a bad field is an error before any device is touched.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from sbv2_jax.errors import InputError
from sbv2_jax.fields import (
    Check,
    check_fields,
    either,
    number,
    one_of,
    regex,
    rules,
    strings,
    text,
    whole,
    words,
)

# Fields that a resumed run may change freely: they alter no number of a step by more than rounding.
_MAY_CHANGE = ("checkpoint", "sample", "mesh", "remat", "attention", "programs", "student.lora.init")

# Which leaves are split over which axes: see `config.mesh.rules` and `sharding.py`.
DEFAULT_RULES = (
    (r"(.*\.)?(step|key|count)", "replicate"),
    (r".*", "fsdp"),
)


FIELDS: dict[str, Check] = {
    "steps": whole(1),
    "batch_size": whole(1),
    "accumulate": whole(1),
    "seed": whole(0, 2**32 - 1),
    "teacher": text(),
    "architecture": text(empty=True),
    "resolution": whole(0),
    "prompts": text(),
    "terms": strings,
    "student.init": text(),
    "student.mode": one_of("full", "lora"),
    "student.lr": number(0, above=True),
    "student.lora.rank": whole(1),
    "student.lora.alpha": number(0, above=True),
    "student.lora.targets": regex,
    "student.lora.init": text(empty=True),
    "score.lr": number(0, above=True),
    "score.rank": whole(1),
    "score.alpha": number(0, above=True),
    "score.targets": regex,
    "score.updates_per_step": whole(1),
    "score.null_prompt_probability": number(0, 1),
    "vsd.weight": number(0),
    "vsd.guidance": number(0),
    "vsd.score_guidance": number(0),
    "vsd.weighting": one_of("sbv2", "dmd"),
    "vsd.t_min": whole(0),
    "vsd.t_max": whole(1, 999),
    "clip.model": text(empty=True),
    "clip.decoder": text(),
    "clip.passes": whole(1),
    "clip.weight": number(0),
    "clip.tau": number(-1, 1),
    "ema": number(0, 1, below=True),
    "optimizer.b1": number(0, 1, below=True),
    "optimizer.b2": number(0, 1, below=True),
    "optimizer.eps": number(0, above=True),
    "optimizer.mu_dtype": one_of("float32", "bfloat16"),
    "optimizer.weight_decay": number(0),
    "optimizer.clip_norm": number(0),
    "optimizer.schedule": one_of("constant", "cosine"),
    "optimizer.warmup": whole(0),
    "mesh.replica": whole(1),
    "mesh.data": either(-1, whole(1)),
    "mesh.fsdp": either(-1, whole(1)),
    "mesh.rules": rules,
    "precision": one_of("float32", "bfloat16"),
    "remat": one_of("none", "block", "auto"),
    "attention": one_of("auto", "xla"),
    "programs": one_of("one", "stages"),
    "checkpoint.every": whole(1),
    "checkpoint.keep": whole(1),
    "sample.every": whole(0),
    "sample.prompts": strings,
}


def default_config() -> ConfigDict:
    """Returns the paper's full training, locked; what the paper leaves open is said by a config file.

    Source: SwiftBrush v2 (Dao et al., 2024) and SwiftBrush's published training command.
    """
    config = ConfigDict()
    config.steps = 20_000  # updates of the student
    config.batch_size = 64  # images of one update, over all devices and accumulation
    config.accumulate = 1  # gradient accumulation: passes that one update is split into
    config.seed = 0  # of the weights, noise, times and the order of the prompts
    config.teacher = "bundled"  # a diffusers directory, a hub id, or "bundled" (the OpenMoji pipeline)
    config.architecture = (
        ""  # "sd15", "sd21-base", "sd21", "sdxl": what the teacher must be; sizes a dry run without it
    )
    config.resolution = 0  # pixels a side; 0 is what the teacher's UNet was made for
    config.prompts = (
        "openmoji"  # a text file, one prompt a line; a TFDS/array_record directory; or "openmoji"
    )
    # Of the student's objective: "vsd", "clip" (where clip.model names one), and any of yours, as
    # "package.module:Class" or "path/file.py:Class" (`distill/terms/term.py`).
    config.terms = ("vsd", "clip")

    config.student = ConfigDict()
    config.student.init = "teacher"  # "teacher", or where its UNet comes from (as for teacher; SD-Turbo)
    config.student.mode = "full"  # "full" trains every weight, "lora" trains low-rank updates of some
    config.student.lr = 1e-6
    config.student.lora = ConfigDict()  # read in "lora" mode
    config.student.lora.rank = 256
    config.student.lora.alpha = 512.0  # the update is scaled by alpha / rank
    config.student.lora.targets = r".*\.attn[12]\.to_(q|k|v|out\.0)"  # full match on the module's path
    config.student.lora.init = (
        ""  # a LoRA file to start from: the same layers, rank and alpha; "" starts anew
    )

    config.score = ConfigDict()  # the LoRA on the teacher that follows the student's distribution
    config.score.lr = 1e-3
    config.score.rank = 64
    config.score.alpha = 108.0
    config.score.targets = r".*\.attn[12]\.to_(q|v)"
    config.score.updates_per_step = 1  # score updates for one student update (DMD2 takes 5 to 10)
    config.score.null_prompt_probability = 0.1  # a sample trains the unconditional score this often

    config.vsd = ConfigDict()
    config.vsd.weight = 1.0  # of the VSD loss in the student's objective
    config.vsd.guidance = 4.5  # classifier-free guidance of the teacher
    config.vsd.score_guidance = 4.5  # and of the score model; at 1 it costs one forward less
    config.vsd.weighting = "sbv2"  # "sbv2": s_t^2; "dmd": by the teacher's own error, in x0
    config.vsd.t_min = 20  # times are drawn from t_min to t_max, both included
    config.vsd.t_max = 980

    config.clip = ConfigDict()
    config.clip.model = ""  # a CLIP directory, a hub id, "bundled", or "" for no CLIP loss
    config.clip.decoder = (
        "vae_tiny"  # "vae_tiny" or "vae" of the teacher, or an AutoencoderTiny directory or hub id
    )
    config.clip.passes = 1  # parts of a batch that go through decoder and CLIP one after the other
    config.clip.weight = 0.0  # at the first step; falls linearly to 0 over the run
    config.clip.tau = 0.35  # a sample whose image and text agree by more than this adds nothing

    config.ema = 0.999  # decay of the averaged student; 0 keeps none

    config.optimizer = ConfigDict()  # AdamW, for the student and for the score model
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.mu_dtype = "float32"  # of the stored first moment; "bfloat16" saves 2 bytes a weight
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0  # of the global gradient norm; 0 does not clip
    config.optimizer.schedule = "constant"  # "constant" or "cosine" (to 0 at the last step)
    config.optimizer.warmup = 0  # steps over which the learning rates rise linearly from 0

    config.mesh = ConfigDict()
    config.mesh.replica = 1  # TPU slices, or machines that a slow network joins; they share out the batch
    config.mesh.data = -1  # devices that share out the batch; -1 is all that the others leave
    config.mesh.fsdp = 1  # devices that share out the batch and the weights; -1 is as few as memory allows
    # (regular expression, strategy) for the names of all leaves, such as "state.student.conv_in.kernel" and
    # "frozen.teacher.conv_in.kernel"; the first full match wins. A strategy is "replicate", or the axes,
    # joined by "+", over which a leaf's largest dimension is split.
    config.mesh.rules = DEFAULT_RULES
    config.precision = "float32"  # of the networks' arithmetic: "float32" or "bfloat16"; masters stay float32
    config.attention = "auto"  # TPU's splash kernel, cuDNN's on a GPU, else XLA; "xla" is XLA everywhere
    config.programs = "one"  # "stages" compiles the step in parts: in less memory, and side by side
    config.remat = (
        "none"  # "block" computes each block again in the backward pass; "auto" where memory asks for it
    )

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 500  # steps between checkpoints
    config.checkpoint.keep = 3  # how many of the newest to keep

    config.sample = ConfigDict()
    config.sample.every = 500  # steps between sample images; 0 draws none
    config.sample.prompts = ("a red apple on a blue background", "a smiling cat")
    return config.lock()


def stable_diffusion_21(argument: str, machine: Mapping[str, Any]) -> ConfigDict:
    """Returns the paper's main run on a machine: SD 2.1 base at 512 px, from SD-Turbo.

    `argument` is a config file's: "lora" is the second training, a LoRA with the CLIP loss (the first one trains
    all weights), "runlocal" shrinks either to a minute on a laptop; both are joined by a comma. `machine` holds
    the fields that fit the run to it. The directories are where a user is expected to put the checkpoints; a
    hub id may stand for each.
    """
    chosen = words(argument, "lora", "runlocal")
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
        config.student.lr = 1e-3
        config.clip.model = "./checkpoints/clip-vit-base-patch32"
        config.clip.decoder = "./checkpoints/taesd"
        config.clip.weight = 0.1
    config.update_from_flattened_dict(machine)
    if "runlocal" in chosen:
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Shrinks a run, in place, to a minute on a laptop: the bundled pipeline, a few steps, one device."""
    config.update(steps=10, batch_size=8, accumulate=1, precision="float32", remat="none", programs="one")
    config.update(teacher="bundled", prompts="openmoji", architecture="", resolution=0)
    config.student.init = "teacher"
    config.student.lora.update(rank=4, alpha=8.0)
    config.score.update(rank=4, alpha=8.0)
    config.clip.model = "bundled" if config.clip.model else ""
    config.clip.decoder = "vae_tiny"
    config.optimizer.warmup = 0
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
    falls = config.optimizer.schedule == "cosine" or config.clip.weight > 0
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
    yield (
        clip.weight > 0 and not clip.model,
        f"config.clip.weight = {clip.weight:g} needs a config.clip.model",
    )
    yield (
        vsd.weight == 0 and clip.weight == 0 and set(config.terms) <= {"vsd", "clip"},
        "config.vsd.weight and config.clip.weight are both 0: nothing trains the student",
    )
    yield (
        config.student.lora.init != "" and config.student.mode != "lora",
        f"config.student.lora.init = {config.student.lora.init!r} needs config.student.mode = 'lora'",
    )
    yield (
        clip.model != ""
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
    _check_batch(config, planned_devices(config))
