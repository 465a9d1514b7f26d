"""The guard of a training: when it is lost, and must end before it saves what is worthless."""

from collections.abc import Mapping
from typing import Any

from sbv2_jax.errors import InputError

# So many steps in a row without a finite loss: the run has diverged and no longer recovers.
MOST_SKIPPED = 20


class Guard:
    """Ends a training that no longer learns: asked once after each step, before that step is saved.

    Args:
      where: what holds the checkpoints, for the message.
      latents_std: the largest `latents/std` that is let pass; 0 is none.
    """

    def __init__(self, where: object, latents_std: float = 0.0):
        self._where, self._latents_std, self._skipped = where, latents_std, 0

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises InputError after MOST_SKIPPED steps in a row that were not finite, or above the limit.

        `metrics` are those of the step, `skipped` among them: 1 where nothing was updated.
        """
        self._skipped = self._skipped + 1 if metrics["skipped"] else 0
        if self._skipped == MOST_SKIPPED:
            raise InputError(
                f"the loss or its gradient was not finite in {self._skipped} steps in a row, up to step {step}: "
                f"lower the learning rates; the checkpoints before are kept in {self._where}"
            )
        if self._latents_std:
            self.check_latents(step, float(metrics["latents/std"]), "at")

    def check_latents(self, step: int, deviation: float, when: str = "after") -> None:
        """Raises InputError above the limit; `deviation` is of what the student draws at, or after, a step."""
        if deviation > self._latents_std:
            raise InputError(
                f"latents/std = {deviation:.3g} {when} step {step} is above "
                f"config.limits.latents_std = {self._latents_std:g}: the run diverges; step {step} is not saved, the "
                f"checkpoints before are kept in {self._where}"
            )
