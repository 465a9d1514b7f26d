"""The training loop: what happens in a run, in order."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sbv2_jax.checkpoint import Checkpoints
from sbv2_jax.checkpoint.files import mounted, step_numbers
from sbv2_jax.cli import command
from sbv2_jax.data.prompts import PromptSource, describe_cut, notes_of, open_prompts, prompt_batches
from sbv2_jax.data.rows import Filling
from sbv2_jax.devices import processes
from sbv2_jax.devices.cache import use_cache
from sbv2_jax.devices.host_memory import give_back_freed_memory, share_one_arena
from sbv2_jax.devices.sharding import Layout
from sbv2_jax.distill.gradients import Batch
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.distill.train_step import TrainStep
from sbv2_jax.errors import InputError
from sbv2_jax.run.arrays import load_frozen, load_state, read_start
from sbv2_jax.run.batches import Tokenizers, next_batch, open_rows
from sbv2_jax.run.build import Run, assemble
from sbv2_jax.run.compilation import begin_step, lay_out
from sbv2_jax.run.components import describe_size, read_parts
from sbv2_jax.run.config import FORMER, may_change, validate
from sbv2_jax.run.directory import CONFIG, EXPORT, sample_path
from sbv2_jax.run.dry_run import dry_run as dry_run_report
from sbv2_jax.run.export import export_best, export_student
from sbv2_jax.run.guard import Guard
from sbv2_jax.run.health import Health
from sbv2_jax.run.log import MetricsLog
from sbv2_jax.run.memory_estimate import device_memory
from sbv2_jax.run.page import write_page
from sbv2_jax.run.painter import Painter
from sbv2_jax.run.preemption import EXIT_PREEMPTED, Preemption, ends_at_once
from sbv2_jax.run.probe import begin_probe
from sbv2_jax.run.progress import ProgressGrid
from sbv2_jax.run.record import Record
from sbv2_jax.run.scoring import Measured, Scoring, open_protocol
from sbv2_jax.run.sources import PLACES, Files, Source, check_forced, sources_of
from sbv2_jax.run.starts import note_start
from sbv2_jax.run.wandb_mirror import WandbMirror, log_in
from sbv2_jax.run.watchdog import watchdog
from sbv2_jax.tree import nbytes


def train(
    config: ConfigDict, workdir: str | Path, *, dry_run: bool = False, force: bool | Sequence[str] = False
) -> int:
    """Runs a distillation to its last step, from where `workdir` left off, and exports the student.

    `dry_run` prints what would be held where and stops; `force` resumes in spite of what is changed: all of
    it, or the fields and sources of these names.
    Returns the exit code: 0, or EXIT_PREEMPTED after SIGTERM or SIGINT.
    Raises InputError for whatever is wrong with the input, before anything is written.
    """
    validate(config)
    workdir = mounted(workdir)
    if dry_run:
        run = assemble(config, read_parts(config, dry_run=True))
        judges = open_protocol(config).networks.params if config.evaluate.every else {}
        print(dry_run_report(config, run, judges))
        return 0
    share_one_arena()
    # In this order: what one process closes behind an error may wait for the others, who must have heard of it.
    with contextlib.ExitStack() as held, processes.ending_together():
        with ends_at_once():
            ready = make_ready(config, workdir, force, held)
        give_back_freed_memory()
        stopped = advance(config, workdir, ready)
        held.close()  # the last step is safe
        if stopped:
            return EXIT_PREEMPTED
        export = workdir / EXPORT
        best = ready.scoring.best if ready.scoring else None
        if config.evaluate.export == "best" and best:
            export_best(workdir, best, export)
        else:
            export_student(ready.run, ready.state, export)
    if jax.process_index() == 0:
        print(write_page(workdir))
        prompt = config.sample.prompts[0] if config.sample.prompts else "a red apple"
        print(f'{command("generate")} --model={export} --prompt="{prompt}" --out=one.png')
    return 0


@dataclasses.dataclass(kw_only=True)
class Ready:
    """All that the steps of a run need; `first` steps are done.

    `probe` is what `begin_probe` returns, where the run has a limit for it.
    """

    run: Run
    mesh: jax.sharding.Mesh
    tokenizers: Tokenizers
    checkpoints: Checkpoints
    first: int
    state: TrainState
    frozen: Frozen
    grid: ProgressGrid | None
    scoring: Scoring | None
    batches: Iterator[list[str]]
    fillings: Sequence[Filling]
    step: TrainStep
    probe: Callable[[TrainState, Frozen, Batch], jax.Array] | None


def make_ready(
    config: ConfigDict, workdir: Path, force: bool | Sequence[str], held: contextlib.ExitStack
) -> Ready:
    """Opens the run's directory, restores or makes its state, and compiles its step; `held` closes what is open."""
    with processes.together():
        prepared = prepare(config, workdir)
    processes.require_same("the configuration", config.to_json_best_effort())
    if jax.process_count() > 1:
        # Process 0 alone keeps what it compiled: the others find it only in a directory that all see.
        use_cache(workdir / "compiled")
    run, layout, source, tokenizers, fillings, start, files, sources, protocol = prepared
    processes.require_same("the content of the models", json.dumps(sources))
    if not isinstance(force, bool):
        check_forced(force, config, sources)
    frozen = load_frozen(run, tokenizers["input_ids"].encode([""])[0], layout.frozen)
    with processes.together():
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            config=config.to_dict(),
            fingerprint=source.fingerprint(),
            sources=sources,
            may_change=may_change(config),
            places=PLACES,
            former=FORMER,
            force=force,
            best=protocol.best if protocol else None,
        )
    held.enter_context(checkpoints)
    processes.require_shared(workdir)
    restored = checkpoints.restore(layout.abstract[0])
    first, state = restored[:2] if restored else (0, load_state(run, layout.state, start))
    with processes.together():
        if jax.process_index() == 0:
            files.remember()
            write_config(workdir / CONFIG, config)
            note_start(workdir, first)
    if jax.process_index() == 0 and first < config.steps:
        print("compiling: a minute or more the first time, less where it was compiled before", flush=True)
    # else only the export is left to do
    compiling = Compiling(config, run, layout) if first < config.steps else None
    grid = scoring = None
    if config.sample.every or protocol:
        painter = Painter(run, frozen, tokenizers["input_ids"], layout.mesh)
    if config.sample.every:
        prompts, keep = tuple(config.sample.prompts), sample_path(workdir, 0).with_name(".teacher.npz")
        grid = ProgressGrid(run, frozen, tokenizers["input_ids"], prompts, painter, keep, sources)
        if not restored:
            grid.draw(state, sample_path(workdir, 0))
    if protocol:
        scoring = Scoring(protocol, config.seed, painter, workdir / "references")
    batches = prompt_batches(
        source,
        config.batch_size,
        config.seed,
        first * run.method.updates,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    step, probe = compiling.finished() if compiling else (_none_left, None)
    return Ready(
        run=run,
        mesh=layout.mesh,
        tokenizers=tokenizers,
        checkpoints=checkpoints,
        first=first,
        state=state,
        frozen=frozen,
        grid=grid,
        scoring=scoring,
        batches=batches,
        fillings=fillings,
        step=step,
        probe=probe,
    )


def _none_left(state: TrainState, frozen: Frozen, batch: Batch) -> NoReturn:
    raise RuntimeError("all steps of the run are done")


def advance(config: ConfigDict, workdir: Path, ready: Ready) -> bool:
    """Runs the steps that are left, and returns whether a signal ended them before the last; `ready.state` advances.

    While the devices take a step, the batch of the next is made and the metrics of the one before are read, so that
    they never wait for the host; where a step is saved, drawn or measured, its own are read first. Raises InputError
    for what cannot be written, also by a save that has failed beside the steps, and as `Guard` does.
    """
    checkpoints, grid, scoring, first = ready.checkpoints, ready.grid, ready.scoring, ready.first
    with Preemption() as preemption, contextlib.ExitStack() as stack:
        with processes.together():
            log = MetricsLog(
                workdir,
                steps=config.steps,
                batch_size=config.batch_size,
                resume_step=first,
                mirror=_mirror(config, workdir),
            )
        stack.enter_context(log)
        guard = Guard(workdir, config.limits.latents_std)
        record = Record(log, guard, Health(ready.run.method, ready.state))

        def read(step: int) -> Batch:
            updates = ready.run.method.updates
            return next_batch(ready.batches, ready.tokenizers, ready.mesh, updates, ready.fillings, step)

        following = read(first) if first < config.steps else {}
        for number in range(first + 1, config.steps + 1):
            batch = following
            with watchdog(number, config.limits.step_seconds):
                checkpoints.check()
                begin = time.monotonic()
                ready.state, metrics = ready.step(ready.state, ready.frozen, batch)
                record.catch_up()
                record.start(number, metrics, begin)
                preempted = preemption.requested()
                last = preempted or number == config.steps
                if not last:
                    following = read(number)
                measures = scoring and not preempted and (last or number % config.evaluate.every == 0)
                saves = last or measures or number % config.checkpoint.every == 0
                draws = grid and (number == config.steps or number % config.sample.every == 0)
                if saves or draws:
                    record.read()
            figures = scoring.measure(ready.state) if scoring and measures else {}
            if saves or draws:
                with watchdog(number, config.limits.step_seconds):
                    record.write(figures)
            if saves:
                if ready.probe:
                    deviation = jax.device_get(ready.probe(ready.state, ready.frozen, batch))
                    with processes.together():
                        guard.check_latents(number, float(deviation))
                checkpoints.save(number, ready.state, extra=figures)
            if grid and draws:
                grid.draw(ready.state, sample_path(workdir, number))
            if preempted:
                logging.warning(
                    "stopped after step %d, which is saved: run the same command to go on", number
                )
                return True
    return False


def _mirror(config: ConfigDict, workdir: Path) -> Callable[[], WandbMirror] | None:
    if not config.wandb.project:
        return None
    return functools.partial(WandbMirror, config.wandb.project, workdir, config.to_dict())


class Prepared(NamedTuple):
    """What a run needs before anything is loaded; `start` holds the factors that the student's LoRA starts from."""

    run: Run
    layout: Layout[jax.sharding.Mesh]
    source: PromptSource
    tokenizers: Tokenizers
    fillings: list[Filling]
    start: dict[str, np.ndarray] | None
    files: Files
    sources: dict[str, Source]
    protocol: Measured | None


def prepare(config: ConfigDict, workdir: Path) -> Prepared:
    """Reads all that can be wrong with a run's input, writes nothing, and logs what each sharding rule matches."""
    if config.wandb.project and jax.process_index() == 0:
        log_in(config.wandb.project)
    protocol = open_protocol(config) if config.evaluate.every else None
    judges = nbytes(protocol.networks.params) if protocol else 0
    config, run, layout = lay_out(config, read_parts(config), jax.devices(), device_memory(), judges)
    for pattern, leaves in layout.matches().items():
        logging.info("sharding rule %r is the first to match %d leaves", pattern, leaves)
    source = open_prompts(config.prompts, config.prompts_column)
    tokenizers: Tokenizers = {"input_ids": run.parts.opened[1]}
    tokenizers |= {column: run.parts.term_tokenizer(clip) for column, clip in run.method.columns.items()}
    prompt_batches(source, config.batch_size, config.seed)  # too few prompts are an error here
    if jax.process_index() == 0:
        said = describe_size(config, run.parts), describe_cut(source, tokenizers["input_ids"])
        for line in (*notes_of(source), *filter(None, said)):
            logging.warning(line)
    start = None
    if config.student.lora.init and not step_numbers(workdir / "checkpoints"):
        start = read_start(run, config.student.lora.init)
    files = Files(workdir)
    sources = sources_of(run.parts, files)
    fillings, own = open_rows(config, run, sources)
    return Prepared(run, layout, source, tokenizers, fillings, start, files, sources | own, protocol)


class Compiling:
    """The step of a run, and the probe where there is a limit for it, while they are compiled beside other things."""

    def __init__(self, config: ConfigDict, run: Run, layout: Layout[jax.sharding.Mesh]):
        self._begin = time.monotonic()
        self._step, self._programs = begin_step(config, run, layout)
        limited = config.limits.latents_std
        self._probe = begin_probe(config, run, layout, self._programs) if limited else None

    def finished(self) -> tuple[TrainStep, Callable | None]:
        """Waits for both, and says how long they took."""
        count = len(self._programs.compiled())
        if jax.process_index() == 0:
            seconds = time.monotonic() - self._begin
            print(f"compiled the step, {count} program(s), in {seconds:.1f} s", flush=True)
        return self._step, self._probe


def write_config(path: Path, config: ConfigDict) -> None:
    """Writes the run's configuration as JSON, in one rename; raises InputError where it cannot be written."""
    scratch = path.with_suffix(".json.tmp")
    try:
        scratch.write_text(config.to_json(indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
