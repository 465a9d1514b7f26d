"""Metrics that tell the health of a run beside its losses: learning rates, weights of terms, seconds, memory."""

import re
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sbv2_jax.distill import optimizers
from sbv2_jax.distill.terms.term import Term
from sbv2_jax.tree import GIB, leaf_names


class Health:
    """Counts the updates of a run from its state, and says what holds of each step.

    Args:
      config: of the run.
      state: that the first step takes, of which the student's optimizer tells how many updates there were: a step
        that is skipped is none.
      terms: of the student's objective.
    """

    def __init__(self, config: ConfigDict, state: Any, terms: Sequence[Term]):
        self._config, self._updates = config, _updates(state)
        # Every other term has a weight of 1.
        self._weighted = [term for term in terms if type(term).weight is not Term.weight]
        rates = {
            "student": _rate(config, config.student.lr, 1),
            "score": _rate(config, config.score.lr, config.score.updates_per_step),
            "discriminator": _rate(config, config.gan.lr, 1),
        }
        trained = {name.partition("_opt.")[0] for name in leaf_names(state)}
        self._rates = {name: rate for name, rate in rates.items() if name in trained}

    def metrics(self, step: int, seconds: float, *, skipped: bool) -> dict[str, float]:
        """Returns the metrics of a step that took so long, without saves and pictures; called once for each.

        `lr/NAME` is the rate of the (first) update of the step, `TERM/weight` what the objective multiplies a term by
        in it, `memory/NAME_gib` what the host, and the fullest device, have had in use at most since the start.
        """
        every = {"score": self._config.score.updates_per_step}
        found = {
            f"lr/{name}": float(rate(every.get(name, 1) * self._updates))
            for name, rate in self._rates.items()
        }
        found |= {f"{term.name}/weight": float(term.weight(jnp.asarray(step - 1))) for term in self._weighted}
        self._updates += not skipped
        return found | {"seconds_per_step": seconds} | _memory()


def _rate(config: ConfigDict, peak: float, updates_per_step: int) -> optax.Schedule:
    values = config.optimizer
    # As the optimizer's own: it counts its updates, the configuration the run's steps.
    return optimizers.learning_rate(
        peak, values.schedule, values.warmup * updates_per_step, config.steps * updates_per_step
    )


def _updates(state: Any) -> int:
    counts = [
        leaf
        for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True)
        if re.fullmatch(r"student_opt\.(.*\.)?count", name)
    ]
    return int(jax.device_get(counts[0]))


def _memory() -> dict[str, float]:
    # Kilobytes, but on macOS bytes.
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"memory/host_gib": host / GIB}
    # A CPU does not say.
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]:
        found["memory/device_gib"] = max(peaks) / GIB
    return found
