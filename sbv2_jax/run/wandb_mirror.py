"""A run at Weights & Biases that mirrors this one: its settings, the metrics of every step, its sample pictures."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbv2_jax.errors import InputError
from sbv2_jax.run.directory import STARTS, sample_pictures


def require_wandb() -> None:
    """Raises InputError where the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError('config.wandb.project: wandb is not installed: pip install "sbv2_jax[wandb]"')


class WandbMirror:
    """Sends what is logged to a project of Weights & Biases; a resumed run goes on in the run that it began there.

    Where a step is taken again after a resume, the later figures are drawn over the former. WANDB_MODE=offline keeps
    all in `workdir/wandb`. Raises InputError where the run cannot be opened, such as without a key.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        # A directory's first start is what stays of it wherever it lies, and that no other run shares.
        first, _, _ = (workdir / STARTS).read_bytes().partition(b"\n")
        name = hashlib.sha256(first + str(config["seed"]).encode()).hexdigest()[:16]
        self._image, self._workdir = wandb.Image, workdir
        self._sent = set(sample_pictures(workdir))
        try:
            self._run = wandb.init(
                project=project, id=name, name=workdir.name, resume="allow", dir=workdir, config=dict(config)
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"config.wandb.project={project}: {reason}") from error
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
