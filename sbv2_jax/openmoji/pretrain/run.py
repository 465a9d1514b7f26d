"""The pre-training from beginning to end: the world, the tokenizer, the networks, one directory."""

import shutil
import sys
from pathlib import Path

from ml_collections import ConfigDict

from sbv2_jax.checkpoint.files import mounted
from sbv2_jax.convert.formats.files import new_directory
from sbv2_jax.convert.formats.pipeline import PipelineParts, load_pipeline
from sbv2_jax.convert.formats.side_files import tokenizer_files
from sbv2_jax.diffusion.schedule import ScheduleConfig
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import Tokenizer, load_tokenizer
from sbv2_jax.openmoji.identities import identities
from sbv2_jax.openmoji.pretrain import settings
from sbv2_jax.openmoji.pretrain.bundle import write_bundle
from sbv2_jax.openmoji.pretrain.dataset import World, open_world
from sbv2_jax.openmoji.pretrain.stages import Stages
from sbv2_jax.openmoji.pretrain.tokenizer import train_tokenizer
from sbv2_jax.openmoji.pretrain.unet import SCHEDULER
from sbv2_jax.openmoji.render import RESOLUTION
from sbv2_jax.run.preemption import Preempted, ends_at_once


def pretrain(config: ConfigDict, workdir: str | Path, command: str) -> Path:
    """Trains the pipeline of a configuration in `workdir` and returns its directory, `workdir/pipeline`.

    Interrupted, it goes on from the newest checkpoint of the stage it was in; complete stages are not trained
    again. SIGTERM or SIGINT finishes the step, saves it and ends the process with EXIT_PREEMPTED; beside the steps it
    ends at once. `command` is quoted in the model card. Raises InputError for a wrong field, without the [openmoji]
    extra, and where the workdir holds a run of other settings.
    """
    settings.validate(config)
    workdir = mounted(workdir)
    try:
        with ends_at_once("beside the steps"):
            return _pretrain(config, workdir, command)
    except Preempted as stopped:  # said where the progress bar is closed
        print(stopped.message, file=sys.stderr, flush=True)
        raise


def _pretrain(config: ConfigDict, workdir: Path, command: str) -> Path:
    given = _given(config.init) if config.init else None
    world = open_world(
        workdir / "world", pictures=config.pictures, phrasings=config.phrasings, seed=config.seed
    )
    tokenizer = _tokenizer(workdir / "tokenizer", world, config.tokenizer, given)
    stages = Stages(config, workdir, world, tokenizer, given)
    components = {name: stages.component(name) for name in settings.COMPONENTS}
    write_bundle(
        workdir / "pipeline",
        components,
        tokenizer_dir=workdir / "tokenizer",
        card={
            "steps": config.unet.sample_steps,
            "guidance": config.unet.guidance,
            "pictures": config.pictures,
            "identities": len(identities("train")),
            "seed": config.seed,
            "command": command,
        },
        figures=stages.figures(),
        grids=[workdir / "grid_unet.png", workdir / "grid_vae.png"],
    )
    return workdir / "pipeline"


def _given(name: str) -> PipelineParts:
    """Opens the pipeline to go on from; raises InputError where a network is missing or it is of another world."""
    given = load_pipeline(name)
    for folder in settings.COMPONENTS:
        given.component_dir(folder)
    side = (given.unet.sample_size or 0) * given.vae.downsampling
    if given.schedule_config != ScheduleConfig.from_dict(SCHEDULER):
        raise InputError(f"config.init: the scheduler of {name} is not the one that pre-training has")
    if not isinstance(given.tokenizer, Tokenizer) or side != RESOLUTION:
        raise InputError(
            f"config.init: {name} is no pipeline of pictures of {RESOLUTION} px with one text tower"
        )
    return given


def _tokenizer(directory: Path, world: World, config: ConfigDict, given: PipelineParts | None) -> Tokenizer:
    if given:
        _copy_tokenizer(given.component_dir("tokenizer"), directory)
    elif not directory.is_dir():
        captions = (text for texts in world.captions for text in texts)
        train_tokenizer(captions, directory, **config)
    tokenizer = load_tokenizer(directory)
    if tokenizer.max_length != config.max_length or tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{directory} is of another config.tokenizer: remove it, or use another workdir")
    return tokenizer


def _copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies a tokenizer, or raises InputError where another one is there: text tower and CLIP read its numbers."""
    files = tokenizer_files(source)
    if not directory.is_dir():
        with new_directory(directory) as partial:
            for path in files:
                shutil.copy(path, partial)
    if _contents(tokenizer_files(directory)) != _contents(files):
        raise InputError(
            f"{directory} is not the tokenizer of config.init: remove it, or use another workdir"
        )


def _contents(paths: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}
