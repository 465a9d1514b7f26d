"""A plan as text: what each program takes, whether it fits, and how long a step would last."""

from sbv2_jax.plan.cost import step_time
from sbv2_jax.plan.plan import Plan
from sbv2_jax.tree import GIB


def text_of(plan: Plan) -> str:
    """Returns the report of a plan; of one that does not compile, what is wanting."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.topology}: {plan.devices} devices, mesh {mesh}, batch {plan.batch_size}",
        f"{plan.flops / plan.batch_size / 1e12:.3g} TFLOP an image, compiled in {plan.seconds:.0f} s",
        "",
    ]
    if plan.programs:
        lines += _table(plan)
    share = f"{plan.peak / GIB:.2f} of {plan.chip.usable / GIB:.2f} GiB a device"
    lines.append(f"fits: {share}" if plan.fits else f"does not fit: {share}")
    if plan.fits:
        time = step_time(plan)
        lines.append(
            f"estimated step: {time.total:.2f} s, {plan.batch_size / time.total:.0f} images/s ({time.bound} bound; an "
            "estimate, not a measurement)"
        )
    if plan.generate:
        need = plan.generate.need.total / GIB
        lines.append(f"generating, one picture a device: {need:.2f} GiB a device")
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    lines = [
        f"{'GiB a device':<22}{'arrays':>9}{'temporary':>11}{'results':>9}{'code':>7}{'total':>8}{'moved':>8}"
    ]
    for name, program in plan.programs.items():
        need = program.need
        moved = sum(program.collectives.values())
        sizes = (need.arrays, need.temporaries, need.results, need.code, need.total, moved)
        widths = (9, 11, 9, 7, 8, 8)
        columns = "".join(f"{size / GIB:>{width}.2f}" for size, width in zip(sizes, widths, strict=True))
        lines.append(f"{name:<22}{columns}")
    largest = max(plan.programs.values(), key=lambda program: program.need.total)
    lines += ["", "the largest arrays of the largest program:"]
    lines += [
        f"  {buffer.bytes / GIB:6.2f} GiB  {buffer.shape}  {buffer.operation}" for buffer in largest.buffers
    ]
    kinds = ", ".join(f"{kind} {size / GIB:.2f} GiB" for kind, size in sorted(plan.collectives.items()))
    return [*lines, "", f"moved between devices in a step: {kinds or 'nothing'}"]
