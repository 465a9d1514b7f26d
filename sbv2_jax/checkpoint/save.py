"""Writing checkpoints in the background, and the directory of one run that owns them."""

import itertools
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from sbv2_jax import tree
from sbv2_jax.checkpoint.files import (
    PARTIAL,
    discard,
    file_sizes,
    fsync_tree,
    mounted,
    open_directory,
    publish,
    step_numbers,
    write_durably,
)
from sbv2_jax.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    among,
    best_step,
    changed_fields,
    changed_sources,
    flatten,
    json_digest,
    read_manifest,
    unlike_leaves,
    write_manifest,
)
from sbv2_jax.checkpoint.parts import Described, describe_own, joined
from sbv2_jax.checkpoint.restore import first_good, read_verified
from sbv2_jax.checkpoint.snapshot import snapshot
from sbv2_jax.checkpoint.versions import versions
from sbv2_jax.devices import processes
from sbv2_jax.errors import InputError, listed

# Orbax gives up on a write after ten minutes; a large state on a shared file system may need longer.
_WRITE_SECONDS = 3600
# So much of a state is encoded at a time, in gigabytes; unlimited, Orbax holds all of it encoded as well.
_WRITE_AT_A_TIME = 1
# The number of a save in this process, the same in all: its processes meet once under each.
_SAVES = itertools.count()
_PACKAGES = ("jax", "orbax-checkpoint")


class NotFinite(CheckpointError):
    """Raised where a state holds NaN or infinities: none is kept."""


class Checkpoints:
    """The checkpoints of one run: locked for this process, saved in the background, verified when restored.

    A step is written under `.partial/`, described by its manifest, forced to the disk and only then renamed
    to its number, so a numbered directory is always a finished one: no kill leaves anything else behind.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        config: dict[str, Any],
        fingerprint: str = "",
        sources: Mapping[str, Mapping[str, str]] | None = None,
        may_change: Sequence[str] = (),
        places: Sequence[str] = (),
        former: Mapping[str, Any] | None = None,
        force: bool | Sequence[str] = False,
        best: tuple[str, str] | None = None,
        asynchronous: bool = True,
    ):
        """Opens, and locks, the directory.

        Args:
          directory: a path on a local or shared file system; made if it is not there.
          keep: how many finished steps to keep; older ones are deleted after a newer one is safe.
          config: the run's configuration, stored with each step and compared at restore.
          fingerprint: identifies the prompt data; compared at restore too, by the name of "prompts".
          sources: {name: {"sha256": ...}} of all else that the run is made from; compared at restore too.
          may_change: dotted config fields, or groups of them, that may differ at restore.
          places: config fields that say where sources are: they may differ where the contents are compared.
          former: what a step that was saved before there was a field stands for, by the field's dotted name.
          force: restore in spite of another configuration, source or data: of any, or of those with these names.
          best: a number that steps are saved with in `extra`, by its name, and whether "higher" or "lower" is better:
            the best of the steps that have it is kept beside the newest ones.
          asynchronous: write in the background; otherwise `save` returns when the step is safe.

        Raises InputError where another process holds the directory or where it cannot be written.
        """
        self._directory = mounted(directory).absolute()
        self._keep = max(1, keep)
        self._config = config
        self._fingerprint = fingerprint
        self._sources = {name: dict(source) for name, source in (sources or {}).items()}
        self._may_change = tuple(may_change)
        self._places = tuple(places)
        self._former = dict(former or {})
        self._force = force
        self._best = best
        self._asynchronous = asynchronous
        self._primary = jax.process_index() == 0
        self._lock = open_directory(self._directory) if self._primary else None
        self._checkpointer = _checkpointer()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[int] = set()

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
        """Saves a pytree of arrays as `step`; the arrays may be donated as soon as this returns.

        `extra` is JSON and comes back from `restore`. Waits for the save before. Raises CheckpointError for a step
        that is not newer than the stored ones, and for what `wait` raises of the save before.
        """
        self.wait()
        if newer := self._finished(step):
            raise CheckpointError(f"step {step} is not saved: {self._directory} already has step {newer[-1]}")
        leaves = _named(state)
        if empty := [name for name, leaf in leaves.items() if leaf.size == 0]:
            raise CheckpointError(f"step {step} is not saved: {listed(empty, ', ')} have zero size")
        manifest = Manifest(
            step=step,
            config=self._config,
            config_sha256=json_digest(self._config),
            fingerprint=self._fingerprint,
            extra=extra or {},
            leaves={},
            files={},
            versions=versions(*_PACKAGES),
            sources=self._sources,
        )
        json_digest(manifest.extra)  # what JSON cannot hold fails here, not in the background
        self._writer = threading.Thread(
            target=self._write, args=(manifest, snapshot(leaves), next(_SAVES)), name="checkpoint"
        )
        self._writer.start()
        if not self._asynchronous:
            self.wait()

    def _write(self, manifest: Manifest, leaves: dict[str, Any], number: int) -> None:
        """Writes a snapshot, and publishes it unless a number in it is not finite; runs beside the steps."""
        try:
            partial = self._directory / PARTIAL / str(manifest.step)
            notes = partial.with_name(f"described-{manifest.step}")
            try:
                self._checkpointer.save(
                    partial, args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves)), force=True
                )
                own = describe_own(leaves, primary=self._primary)
                leaves.clear()
                if not self._primary:
                    notes.mkdir(exist_ok=True)
                    write_durably(notes / f"{jax.process_index()}.json", json.dumps(own))
                self._checkpointer.wait_until_finished()
            finally:
                # Not by the devices, which are taking steps; and also by a process that has failed.
                ocp.multihost.sync_global_processes(
                    f"described-{number}", timeout=_WRITE_SECONDS, processes=set(range(jax.process_count()))
                )
            if self._primary:
                others = [
                    Described(*json.loads((notes / f"{index}.json").read_text(encoding="utf-8")))
                    for index in range(1, jax.process_count())
                ]
                shutil.rmtree(notes, ignore_errors=True)
                self._publish(manifest, joined([own, *others]))
        except BaseException as error:  # noqa: BLE001 (raised again by the next save, wait or close)
            self._error = error

    def _publish(self, manifest: Manifest, described: Described) -> None:
        partial = self._directory / PARTIAL / str(manifest.step)
        if described.not_finite:
            shutil.rmtree(partial, ignore_errors=True)
            count = len(described.not_finite)
            raise NotFinite(
                f"step {manifest.step} is not saved: NaN or Inf in {count} leaves: {listed(described.not_finite, ', ')}"
            )
        fsync_tree(partial)
        contents = {"leaves": described.leaves, "files": file_sizes(partial)}
        write_manifest(partial, Manifest(**{**vars(manifest), **contents}))
        publish(self._directory, manifest.step)
        self._damaged.discard(manifest.step)
        finished = self._finished()
        kept = {*finished[-self._keep :], best_step(self._directory, *self._best) if self._best else None}
        for old in finished:
            if old not in kept:
                discard(self._directory, old)

    def _finished(self, first: int = 0) -> list[int]:
        """Returns the steps, from `first` on, with a sound manifest that no restore of this process found damaged."""
        finished = []
        for step in step_numbers(self._directory):
            if step < first:
                continue
            try:
                read_manifest(self._directory / str(step), step)
            except CheckpointError:
                continue
            if step not in self._damaged:
                finished.append(step)
        return finished

    def restore(self, abstract: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest step that verifies, or exactly `step`.

        Args:
          abstract: a pytree of ShapeDtypeStructs with shardings, the result's structure and placement.
          step: one step, without fallback.

        Returns the step, the state and the `extra` that was saved with it; None where nothing was ever saved.
        Raises CheckpointError where steps are stored but none verifies, and InputError, listing every
        difference, where a sound step has other leaves, shapes, dtypes, configuration or prompt data.
        """
        self.wait()
        if step is None and not step_numbers(self._directory):
            return None
        targets = _named(abstract)

        def read(candidate: int) -> tuple[dict[str, Any], Manifest]:
            directory = self._directory / str(candidate)
            manifest = read_manifest(directory, candidate)
            self._refuse_another_run(directory, manifest, targets)
            return read_verified(directory, manifest, targets), manifest

        found, (leaves, manifest), damaged = first_good(self._directory, step, read)
        self._damaged.update(damaged)
        state = jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in targets])
        return found, state, manifest.extra

    def _refuse_another_run(self, directory: Path, manifest: Manifest, targets: dict[str, Any]) -> None:
        unlike = unlike_leaves(manifest.leaves, targets)
        if unlike:
            listed = "; ".join(unlike)
            raise InputError(f"{directory} does not fit the model in {len(unlike)} leaves: {listed}")
        changed = changed_fields(self._former | flatten(manifest.config), flatten(self._config))
        free = self._may_change
        if manifest.sources:
            free += self._places
        changed = {name: line for name, line in changed.items() if not among(name, free)}
        if manifest.sources:
            changed |= changed_sources(manifest.sources, self._sources)
        if manifest.fingerprint != self._fingerprint:
            changed["prompts"] = f"the prompt data was {manifest.fingerprint!r}, is {self._fingerprint!r}"
        if self._force is not True:
            changed = {name: line for name, line in changed.items() if not among(name, self._force or ())}
            if changed:
                raise InputError(
                    f"{directory} was saved by another configuration: {'; '.join(changed.values())} "
                    f"(use another directory, or, where it is meant, --force={','.join(changed)})"
                )
        if self._primary:
            _tell_versions(manifest.versions)

    def check(self) -> None:
        """Raises what `wait` raises if the last save has ended; of several processes the next save tells all."""
        if jax.process_count() == 1 and self._writer is not None and not self._writer.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is safe on the disk.

        Raises CheckpointError for NaN or Inf in what was saved, of which nothing is kept, and for an error of the
        writing: that one at every later call too.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
            with processes.together():  # published for all, or for none
                self._raise_error()
        self._raise_error()

    def _raise_error(self) -> None:
        error = self._error
        if isinstance(error, NotFinite):
            self._error = None  # the next state may be sound
            raise error
        if error is not None:
            raise CheckpointError(f"a checkpoint could not be written: {error}") from error

    def close(self) -> None:
        """Waits for the last save, then releases the lock; raises the save's error if it failed."""
        try:
            self.wait()
        finally:
            self._release()

    def _release(self) -> None:
        self._checkpointer.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
            return
        # An error that is already on its way says more; other processes may not have met it, so none is waited for.
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._release()


def _checkpointer() -> ocp.AsyncCheckpointer:
    """Returns Orbax's writer, to be called beside the steps: its processes meet without their devices."""
    options = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    # A part that several devices still repeat is written by one: the one that describes it.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    state = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=_WRITE_AT_A_TIME,
        use_compression=False,  # it would save a twelfth of the bytes, for half of the cores' time
        multiprocessing_options=options,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
        ),
    )
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            state=state, composite_options=ocp.CompositeOptions(multiprocessing_options=options)
        ),
        timeout_secs=_WRITE_SECONDS,
        multiprocessing_options=options,
    )


def _tell_versions(saved: Mapping[str, str]) -> None:
    now = versions(*_PACKAGES)
    if other := [
        f"{name} {saved[name]}, now {now[name]}" for name in now if name in saved and saved[name] != now[name]
    ]:
        logging.warning(
            "the checkpoint was saved by %s: the run goes on, not to the same bits", "; ".join(other)
        )


def _named(state: Any) -> dict[str, Any]:
    names = tree.leaf_names(state)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"leaves with one name: {', '.join(twice)}")
    return dict(zip(names, jax.tree.leaves(state), strict=True))
