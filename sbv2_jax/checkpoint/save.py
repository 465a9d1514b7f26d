"""Writing checkpoints in the background, and the directory of one run that owns them."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
)
from sbv2_jax.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    among,
    best_step,
    changed_fields,
    changed_sources,
    describe,
    flatten,
    host_copy,
    json_digest,
    read_manifest,
    unlike_leaves,
    write_manifest,
)
from sbv2_jax.checkpoint.restore import first_good, read_verified
from sbv2_jax.devices import processes
from sbv2_jax.errors import InputError

# Orbax gives up on a write after ten minutes; a large state on a shared file system may need longer.
_WRITE_SECONDS = 3600
_VERSIONS = ("sbv2_jax", "jax", "orbax-checkpoint")


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
        handler = ocp.CompositeCheckpointHandler()
        self._checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=_WRITE_SECONDS)
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[int] = set()

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
        """Saves a pytree of arrays as `step`; the arrays may be donated as soon as this returns.

        `extra` is JSON and comes back from `restore`. Waits for the save before. Raises CheckpointError for
        NaN or Inf, for a step that is not newer than the stored ones, and for an error of the save before.
        """
        self.wait()
        newer = [found for found in self._finished() if found >= step]
        if newer:
            raise CheckpointError(f"step {step} is not saved: {self._directory} already has step {newer[-1]}")
        leaves = _named(state)
        _refuse_non_finite(step, leaves)
        manifest = Manifest(
            step=step,
            config=self._config,
            config_sha256=json_digest(self._config),
            fingerprint=self._fingerprint,
            extra=extra or {},
            leaves={},
            files={},
            versions=_versions(),
            sources=self._sources,
        )
        json_digest(manifest.extra)  # what JSON cannot hold fails here, not in the background
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        hosts = {}
        for name, leaf in leaves.items():
            copy = host_copy(leaf)  # by all processes together
            if self._primary:
                hosts[name] = copy
        try:
            self._checkpointer.save(
                self._directory / PARTIAL / str(step),
                args=ocp.args.Composite(state=ocp.args.StandardSave(leaves)),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"step {step} is not saved: {error}") from error
        self._writer = threading.Thread(target=self._finish, args=(manifest, hosts), name="checkpoint")
        self._writer.start()
        if not self._asynchronous:
            self.wait()

    def _finish(self, manifest: Manifest, hosts: dict[str, np.ndarray]) -> None:
        try:
            described = describe(hosts)
            hosts.clear()
            self._checkpointer.wait_until_finished()
            if self._primary:
                self._publish(manifest, described)
        except BaseException as error:  # noqa: BLE001 (raised again by the next save, wait or close)
            self._error = error

    def _publish(self, manifest: Manifest, described: dict[str, dict[str, Any]]) -> None:
        partial = self._directory / PARTIAL / str(manifest.step)
        fsync_tree(partial)
        contents = {"leaves": described, "files": file_sizes(partial)}
        write_manifest(partial, Manifest(**{**vars(manifest), **contents}))
        publish(self._directory, manifest.step)
        self._damaged.discard(manifest.step)
        finished = self._finished()
        kept = {*finished[-self._keep :], best_step(self._directory, *self._best) if self._best else None}
        for old in finished:
            if old not in kept:
                discard(self._directory, old)

    def _finished(self) -> list[int]:
        """Returns the steps with a sound manifest that no restore of this process found damaged."""
        finished = []
        for step in step_numbers(self._directory):
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

    def wait(self) -> None:
        """Waits until the last save is safe on the disk; raises its error, now and at every later call."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
            with processes.together():  # published for all, or for none
                self._raise_error()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise CheckpointError(f"a checkpoint could not be written: {self._error}") from self._error

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


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(PackageNotFoundError):  # a package that runs where it lies, not installed
            found[name] = version(name)
    return found


def _tell_versions(saved: Mapping[str, str]) -> None:
    now = _versions()
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


def _refuse_non_finite(step: int, leaves: dict[str, Any]) -> None:
    floating = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # One after the other: on a host of few cores, programs that wait for each other's devices never end.
    finite = {name: bool(_all_finite(leaf)) for name, leaf in floating.items()}
    bad = [name for name in floating if not finite[name]]
    if bad:
        raise CheckpointError(
            f"step {step} is not saved: NaN or Inf in {len(bad)} leaves: {', '.join(bad[:20])}"
            + (" ..." if len(bad) > 20 else "")
        )


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
