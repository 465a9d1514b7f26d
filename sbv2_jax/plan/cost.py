"""A simple model of the time of a step: arithmetic, memory and links, each at a stated share of its peak."""

import dataclasses

from sbv2_jax.plan.plan import Plan

# Shares of the peak that large convolutions and products, memory and links reach in practice: assumed, not
# measured.
ARITHMETIC, MEMORY, LINKS = 0.4, 0.7, 0.6


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step: the longer of arithmetic and memory, which overlap, and the links, which may not."""

    arithmetic: float
    memory: float
    links: float

    @property
    def total(self) -> float:
        """The estimate, with nothing of the links hidden behind arithmetic."""
        return max(self.arithmetic, self.memory) + self.links

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return max(("arithmetic", "memory", "links"), key=lambda name: getattr(self, name))


def step_time(plan: Plan) -> StepTime:
    """Estimates the time of a step.

    Memory is read and written once for each program: its arrays and temporaries; what a program reads again is
    not counted. Collectives move their results over the links once.
    """
    touched = sum(
        program.calls * (program.need.arrays + 2 * program.need.temporaries + program.need.results)
        for program in plan.programs.values()
    )
    return StepTime(
        arithmetic=plan.flops / plan.devices / (ARITHMETIC * plan.chip.flops),
        memory=touched / (MEMORY * plan.chip.bandwidth),
        links=sum(plan.collectives.values()) / (LINKS * plan.chip.links),
    )
