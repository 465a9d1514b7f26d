"""What a run would hold and where, from shapes alone: the text of `--dry_run`."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from sbv2_jax.devices.sharding import AXES, Layout, bytes_per_device
from sbv2_jax.run.build import Run
from sbv2_jax.run.config import check_mesh, planned_devices
from sbv2_jax.tree import GIB, Params, count, nbytes


def dry_run(config: ConfigDict, run: Run, judges: Mapping[str, Params]) -> str:
    """Returns the mesh, parameter counts, shardings and bytes per device; touches no device.

    The mesh is that of the configuration, wherever the command runs; `mesh.data` = -1 counts as 1. `judges` are the
    networks that measure the student while it trains, by label: every device holds all of each.
    """
    mesh = AbstractMesh(check_mesh(config, planned_devices(config)), AXES)
    state, frozen = run.state_shapes, run.frozen_shapes
    layout = Layout(mesh, config.mesh.rules, state, frozen)
    lines = [
        f"mesh: {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())} = {mesh.size} devices, "
        f"batch {config.batch_size} in {config.accumulate} part(s), "
        f"{config.batch_size // (config.accumulate * mesh.size)} image(s) a device at a time",
        f"latents: {' x '.join(map(str, run.method.latent_shape))}, networks in {config.precision}",
        *_further(run, config.batch_size),
        "",
        f"{'':<28}{'parameters':>16}{'GiB':>10}{'GiB a device':>14}",
    ]
    parts: dict[str, tuple[Any, Any]] = {}
    for name, player in state.players.items():
        placed = layout.state.players[name]
        parts[f"{name}, trained"] = (player.params, placed.params)
        parts[f"{name}, optimizer"] = (player.opt, placed.opt)
    parts["student, EMA"] = (state.ema, layout.state.ema)
    for name, tree in frozen.items():
        parts[f"{name}, frozen"] = (tree, layout.frozen[name])
    for label, tree in judges.items():
        parts[f"{label}, judge"] = (tree, dict.fromkeys(tree, layout.placement.whole))
    total = 0
    for name, (tree, placed) in parts.items():
        if not jax.tree.leaves(tree):
            continue
        on_device = bytes_per_device(tree, placed)
        total += on_device
        parameters = f"{count(tree):,}" if isinstance(tree, dict) else ""
        lines.append(f"{name:<28}{parameters:>16}{nbytes(tree) / GIB:>10.3f}{on_device / GIB:>14.3f}")
    lines += [f"{'total a device':<54}{total / GIB:>14.3f}", "", "sharding rules, first match wins:"]
    for (pattern, strategy), leaves in zip(layout.rules, layout.matches().values(), strict=True):
        lines.append(f"  {strategy:<10} {leaves:>6} leaves  {pattern}")
    lines += ["", "the largest leaves of the student:"]
    for name in sorted(state.student, key=lambda name: -state.student[name].size)[:5]:
        lines.append(f"  {name} {state.student[name].shape} {layout.state.student[name].spec}")
    lines += ["", "activations, gradients and the compiler's temporaries come on top."]
    return "\n".join(lines)


def _further(run: Run, batch_size: int) -> list[str]:
    """Returns a line for a student of several steps, each player with several updates, each term with own rows."""
    timesteps = run.method.student.timesteps
    earlier = len(timesteps) - 1
    few = [
        f"student of {len(timesteps)} steps, at {', '.join(map(str, timesteps))}: of 0 to {earlier} of them before the "
        f"one that is trained, {earlier / 2:g} on average, a step takes a forward without gradient"
    ]
    return (
        few * (earlier > 0)
        + [
            f"{player.updates} {player.name} updates a step, {player.updates - 1} of them on "
            f"{(player.updates - 1) * batch_size} further prompts and samples"
            for player in run.method.followers
            if player.updates > 1
        ]
        + [
            f"{rows.count} of the {batch_size} rows of a batch are filled for the term {name!r} ({rows.field})"
            for name, rows in run.method.rows.items()
        ]
    )
