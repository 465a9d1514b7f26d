"""The training loop: what happens in a run, in order."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.checkpoint.files import mounted, step_numbers
from sbv2_jax.data.prompts import PromptSource, describe_cut, open_prompts, prompt_batches
from sbv2_jax.devices import processes
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.devices.sharding import Layout, batch_sharding
from sbv2_jax.distill.gradients import Batch
from sbv2_jax.distill.train_step import TrainStep
from sbv2_jax.errors import InputError
from sbv2_jax.models.tokenizer import Tokenizer, TokenizerPair, load_tokenizer
from sbv2_jax.run.arrays import load_frozen, load_state, read_start
from sbv2_jax.run.build import Run, assemble
from sbv2_jax.run.compilation import compile_step, lay_out
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import may_change, validate
from sbv2_jax.run.dry_run import dry_run as dry_run_report
from sbv2_jax.run.export import export_student
from sbv2_jax.run.log import MetricsLog
from sbv2_jax.run.memory_estimate import device_memory
from sbv2_jax.run.preemption import EXIT_PREEMPTED, Preemption
from sbv2_jax.run.progress import ProgressGrid

# So many steps in a row without a finite loss: the run has diverged and no longer recovers.
MOST_SKIPPED = 20


def train(config: ConfigDict, workdir: str | Path, *, dry_run: bool = False, force: bool = False) -> int:
    """Runs a distillation to its last step, from where `workdir` left off, and exports the student.

    `dry_run` prints what would be held where and stops; `force` resumes in spite of a changed configuration.
    Returns the exit code: 0, or EXIT_PREEMPTED after SIGTERM or SIGINT.
    Raises InputError for whatever is wrong with the input, before anything is written.
    """
    validate(config)
    workdir = mounted(workdir)
    if dry_run:
        print(dry_run_report(config, assemble(config, read_parts(config, dry_run=True))))
        return 0
    with processes.together():
        prepared = prepare(config, workdir)
    processes.require_same("the configuration", config.to_json_best_effort())
    if jax.process_count() > 1:
        # Process 0 alone keeps what it compiled: the others find it only in a directory that all see.
        use_cache(workdir / "compiled")
    run, layout, source, tokenizers, start = prepared
    mesh = layout.mesh
    frozen = load_frozen(run, tokenizers["input_ids"].encode([""])[0], layout.frozen)

    with processes.together():
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            config=config.to_dict(),
            fingerprint=source.fingerprint(),
            may_change=may_change(config),
            force=force,
        )
    processes.require_shared(workdir)
    with checkpoints, Preemption() as preemption:
        restored = checkpoints.restore(layout.abstract[0])
        first, state = restored[:2] if restored else (0, load_state(run, layout.state, start))
        write_config(workdir / "config.json", config)
        grid = None
        if config.sample.every:
            grid = ProgressGrid(run, frozen, tokenizers["input_ids"], tuple(config.sample.prompts), mesh)
            if not restored:
                grid.draw(state, sample_path(workdir, 0))
        batches = prompt_batches(
            source,
            config.batch_size,
            config.seed,
            first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if first < config.steps:  # else only the export is left to do
            step = compiled(config, run, layout)
        with MetricsLog(workdir, steps=config.steps, batch_size=config.batch_size, resume_step=first) as log:
            skipped = 0
            for number in range(first + 1, config.steps + 1):
                state, metrics = step(state, frozen, next_batch(batches, tokenizers, mesh))
                metrics = jax.device_get(metrics)
                log.write(number, metrics)
                skipped = skipped + 1 if metrics["skipped"] else 0
                if skipped == MOST_SKIPPED:
                    raise InputError(
                        f"the loss or its gradient was not finite in {skipped} steps in a row, up to step "
                        f"{number}: lower the learning rates; the checkpoints before are kept in {workdir}"
                    )
                preempted = preemption.requested()
                if preempted or number == config.steps or number % config.checkpoint.every == 0:
                    checkpoints.save(number, state)
                if grid and (number == config.steps or number % config.sample.every == 0):
                    grid.draw(state, sample_path(workdir, number))
                if preempted:
                    logging.warning(
                        "stopped after step %d, which is saved: run the same command to go on", number
                    )
                    return EXIT_PREEMPTED

    export = workdir / "export"
    export_student(run, state, export)
    if jax.process_index() == 0:
        prompt = config.sample.prompts[0] if config.sample.prompts else "a red apple"
        print(f'python launch/generate.py --model={export} --prompt="{prompt}" --out=one.png')
    return 0


class Prepared(NamedTuple):
    """What a run needs before anything is loaded; `start` holds the factors that the student's LoRA starts from."""

    run: Run
    layout: Layout
    source: PromptSource
    tokenizers: dict[str, Tokenizer | TokenizerPair]
    start: dict[str, np.ndarray] | None


def prepare(config: ConfigDict, workdir: Path) -> Prepared:
    """Reads all that can be wrong with a run's input, writes nothing, and logs what each sharding rule matches."""
    config, run, layout = lay_out(config, read_parts(config), jax.devices(), device_memory())
    for pattern, leaves in layout.matches().items():
        logging.info("sharding rule %r is the first to match %d leaves", pattern, leaves)
    source = open_prompts(config.prompts)
    tokenizers = load_tokenizers(run)
    prompt_batches(source, config.batch_size, config.seed)  # too few prompts are an error here
    if jax.process_index() == 0 and (cut := describe_cut(source, tokenizers["input_ids"])):
        logging.warning(cut)
    start = None
    if config.student.lora.init and not step_numbers(workdir / "checkpoints"):
        start = read_start(run, config.student.lora.init)
    return Prepared(run, layout, source, tokenizers, start)


def compiled(config: ConfigDict, run: Run, layout: Layout) -> TrainStep:
    """Compiles the step, and says how long that took."""
    begin = time.monotonic()
    step, programs = compile_step(config, run, layout)
    if jax.process_index() == 0:
        count = len(programs.compiled())
        print(f"compiled the step, {count} program(s), in {time.monotonic() - begin:.1f} s", flush=True)
    return step


def load_tokenizers(run: Run) -> dict[str, Tokenizer | TokenizerPair]:
    """Loads the tokenizer of each column of a batch: the text encoder's, SDXL's two as one, and the terms' CLIPs'.

    A CLIP may share the pipeline's first one. Raises InputError where a tokenizer does not fit its network.
    """
    pipeline = run.parts.pipeline / "tokenizer"
    found = []
    for name, part in run.parts.text_encoders.items():
        directory = pipeline.with_name(name.replace("text_encoder", "tokenizer"))
        found.append(load_tokenizer(directory))
        _require_fit(found[-1], part.config, directory)
    tokenizers = {"input_ids": found[0] if len(found) == 1 else TokenizerPair(*found)}
    for column, name in run.method.columns.items():
        clip = run.parts.networks[name]
        own = (clip.directory / "tokenizer_config.json").is_file()
        directory = clip.directory if own else pipeline
        tokenizers[column] = load_tokenizer(directory)
        _require_fit(tokenizers[column], clip.config.text_config, directory)
    return tokenizers


def _require_fit(tokenizer: Tokenizer, config, directory: Path) -> None:
    have = (tokenizer.max_length, tokenizer.vocab_size)
    want = (config.max_position_embeddings, config.vocab_size)
    if have != want:
        raise InputError(f"{directory}: (length, vocabulary) is {have}; its text encoder has {want}")


def next_batch(
    batches: Iterator[list[str]],
    tokenizers: dict[str, Tokenizer | TokenizerPair],
    mesh: jax.sharding.Mesh,
) -> Batch:
    """Reads and tokenizes this process's next prompts and makes the global, sharded batch of them."""
    prompts, sharding = next(batches), batch_sharding(mesh)
    return {
        column: jax.make_array_from_process_local_data(sharding, tokenizer.encode(prompts))
        for column, tokenizer in tokenizers.items()
    }


def write_config(path: Path, config: ConfigDict) -> None:
    """Writes the run's configuration as JSON, in one rename; raises InputError where it cannot be written."""
    if jax.process_index() == 0:
        scratch = path.with_suffix(".json.tmp")
        try:
            scratch.write_text(config.to_json(indent=2) + "\n", encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def sample_path(workdir: Path, step: int) -> Path:
    """Returns the path of the grid of a step."""
    return workdir / "samples" / f"step_{step:06d}.png"
