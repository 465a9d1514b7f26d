"""A simple model of the time of a step: arithmetic, memory and links, each at a stated share of its peak."""

import dataclasses

from sbv2_jax.plan.plan import Plan

# Shares of the peak that large convolutions and products, memory and links reach in practice: assumed, not
# measured.
ARITHMETIC, MEMORY, LINKS = 0.4, 0.7, 0.6
# Bytes/s of one chip through the data centre's network, between slices: 100 Gbit/s for a host of two chips.
NETWORK = 6.25e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step: the longer of arithmetic and memory, which overlap, and what is sent, which may not."""

    arithmetic: float
    memory: float
    links: float
    network: float = 0.0

    @property
    def total(self) -> float:
        """The estimate, with nothing that is sent hidden behind arithmetic."""
        return max(self.arithmetic, self.memory) + self.links + self.network

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return max(("arithmetic", "memory", "links", "network"), key=lambda name: getattr(self, name))


def step_time(plan: Plan) -> StepTime:
    """Estimates the time of a step from its FLOPs, the bytes that its programs access, and its collectives.

    In a ring of n devices a device sends (n - 1) / n of what an all-gather gives or a reduce-scatter takes, and
    twice that in an all-reduce.
    """
    accessed = sum(program.calls * program.accessed for program in plan.programs.values())
    weights = {"all-reduce": 2, "reduce-scatter": plan.mesh["fsdp"]}
    results = sum(weights.get(kind, 1) * size for kind, size in plan.collectives.items())
    sent = results * (plan.devices - 1) / plan.devices
    return StepTime(
        arithmetic=plan.flops / plan.devices / (ARITHMETIC * plan.chip.flops),
        memory=accessed / (MEMORY * plan.chip.bandwidth),
        links=sent / (LINKS * plan.chip.links),
    )


def at_scale(plan: Plan, devices: int) -> StepTime:
    """Estimates the step of a plan on more devices with the same number of images on each: weak scaling.

    Weights are split over as many devices as in the plan, so that gathers stay what they are; gradients are summed
    over all. Slices beyond the largest of the generation are joined by the data centre's network, over which each
    device sends its part of the student's gradients, 2 (s - 1) / s of it for s slices.
    """
    own = step_time(plan)
    slices = -(-devices // plan.chip.largest_slice)
    inside = devices // slices
    ratio = ((inside - 1) / inside) / ((plan.devices - 1) / plan.devices)
    return dataclasses.replace(
        own,
        links=ratio * own.links,
        network=2 * (slices - 1) / slices * plan.gradient_bytes / (LINKS * NETWORK),
    )
