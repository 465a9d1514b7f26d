"""The rival of every rung: the teacher in the setting that was best on validation prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from sbv2_jax.diffusion.schedule import is_guided

# On validation prompts, with both samplers; in one step they are the same.
SWEEP: dict[str, Any] = {"count": 500, "steps": "1,2,4,8,25,50", "guidance": "1,1.5,2,3,4.5,7.5"}


class Setting(NamedTuple):
    """How the teacher draws; the sampler is None in one step, where there is no choice."""

    steps: int
    guidance: float
    sampler: str | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Returns the setting that a row of a report has, or a file."""
        return cls(values["steps"], values["guidance"], values.get("sampler"))

    @property
    def forwards(self) -> int:
        """The UNet's forwards for a picture."""
        return self.steps * (2 if is_guided(self.guidance) else 1)

    @property
    def model(self) -> str:
        """The bundled teacher with this setting, as `launch/evaluate.py` takes it."""
        sampler = f",sampler={self.sampler}" if self.sampler else ""
        return f"bundled,steps={self.steps},guidance={self.guidance:g}{sampler}"

    def __str__(self) -> str:
        said = f"{self.steps} step{'s' if self.steps > 1 else ''}, guidance {self.guidance:g}"
        return said + (f", {self.sampler}" if self.sampler else "")


def best_row(rows: Sequence[Mapping[str, Any]], rule: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the row of a report that is best by the rule's decisive figures: the lowest sum of its ranks in each.

    Of equal ones it is that of the fewest forwards.
    """
    names = [(label, figure, way) for label, own in rule["decisive"].items() for figure, way in own.items()]
    total = np.zeros(len(rows))
    for label, figure, way in names:
        values = np.array([row["figures"][label][figure]["value"] for row in rows])
        total += (values[:, None] > values[None] if way == "lower" else values[:, None] < values[None]).sum(1)
    return rows[min(range(len(rows)), key=lambda row: (total[row], rows[row]["forwards"]))]
