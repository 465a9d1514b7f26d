"""A run at Weights & Biases that mirrors this one: its settings, the metrics of every step, its sample pictures."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbv2_jax.errors import InputError
from sbv2_jax.run.directory import sample_pictures


def log_in(project: str) -> None:
    """Makes sure, before there is anything of a run, that it can be mirrored; at a terminal a key may be asked for.

    Raises InputError where the package is not installed, and without a key that could be right.
    """
    if importlib.util.find_spec("wandb") is None:
        raise InputError(
            f'config.wandb.project={project}: wandb is not installed: pip install "sbv2_jax[wandb]"'
        )
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise _refused(project, error) from error


class WandbMirror:
    """Sends what is logged to a project of Weights & Biases; a resumed run goes on in the run that it began there.

    Where a step is taken again after a resume, the later figures are drawn over the former. WANDB_MODE=offline keeps
    all in `workdir/wandb`. Raises InputError where the run cannot be opened.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        self._image, self._workdir = wandb.Image, workdir
        self._sent = set(sample_pictures(workdir))
        try:
            self._run = wandb.init(
                project=project,
                id=_id(workdir / "wandb"),
                name=workdir.name,
                resume="allow",
                dir=workdir,
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise _refused(project, error) from error
        # Its own steps only ever rise; ours go back where a run was killed.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the metrics of a step, and the pictures that there are since the last."""
        self._run.log({"step": step, **values})
        self._send_pictures()

    def close(self) -> None:
        """Sends what is left, and waits for it."""
        self._send_pictures()
        self._run.finish()

    def _send_pictures(self) -> None:
        for step, path in sample_pictures(self._workdir).items():
            if step not in self._sent:
                self._sent.add(step)
                self._run.log({"step": step, "samples": self._image(str(path))})


def _id(directory: Path) -> str:
    """Returns the id of the run there, which lies beside what wandb itself keeps, so that every start finds it."""
    path = directory / "id"
    if not path.exists():
        directory.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _refused(project: str, error: Exception) -> InputError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return InputError(f"config.wandb.project={project}: {reason}")
