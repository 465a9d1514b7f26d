"""Metrics that tell the health of a run beside its losses: learning rates, weights of terms, seconds, memory."""

import re
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp

from sbv2_jax.distill.method import Method
from sbv2_jax.distill.terms.term import Term
from sbv2_jax.tree import GIB, leaf_names


class Health:
    """Counts the updates of a run from its state, and says what holds of each step.

    Args:
      method: of the run, whose players have learning rates and whose terms have weights.
      state: that the first step takes, of which the student's optimizer tells how many updates there were: a step
        that is skipped is none.
    """

    def __init__(self, method: Method, state: Any):
        self._updates = _updates(state)
        self._rates = {
            player.name: (player.rate, player.updates)
            for player in method.players.values()
            if player.rate is not None
        }
        # Every other term has a weight of 1.
        self._weighted = [term for term in method.terms if type(term).weight is not Term.weight]

    def metrics(self, step: int, seconds: float, *, skipped: bool) -> dict[str, float]:
        """Returns the metrics of a step that took so long, without saves and pictures; called once for each.

        `lr/NAME` is the rate of the (first) update of the step, `TERM/weight` what the objective multiplies a term by
        in it, `memory/NAME_gib` what the host, and the fullest device, have had in use at most since the start.
        """
        found = {
            f"lr/{name}": float(rate(updates * self._updates))
            for name, (rate, updates) in self._rates.items()
        }
        found |= {f"{term.name}/weight": float(term.weight(jnp.asarray(step - 1))) for term in self._weighted}
        self._updates += not skipped
        return found | {"seconds_per_step": seconds} | _memory()


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
