"""An estimate, before anything is compiled, of the memory that a run takes of each device."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from sbv2_jax.devices.sharding import AXES, Layout, bytes_per_device
from sbv2_jax.distill.player import Player
from sbv2_jax.distill.random_numbers import keys_of_step
from sbv2_jax.errors import InputError
from sbv2_jax.run.batches import abstract_batch
from sbv2_jax.run.build import Run, assemble
from sbv2_jax.run.components import Parts
from sbv2_jax.run.config import check_mesh
from sbv2_jax.tree import GIB, nbytes

# What the compiler's own temporaries and fragmentation leave of a device.
USABLE = 0.85
# A block that is computed again makes about so many arrays of the size of its input.
_ARRAYS_OF_A_BLOCK = 32


def fit(
    config: ConfigDict, parts: Parts, device_count: int, memory: float | None, beside: float = 0
) -> ConfigDict:
    """Returns the configuration with `mesh.fsdp` = -1 and `remat` = "auto" settled, by the estimate.

    The weights are split over as few devices as possible, a power of two, and activations recomputed only where
    that is needed for it. `memory` is that of one device in bytes; None, of a CPU, fits everything. `beside` are the
    bytes of it that other networks hold.
    Raises InputError, with the estimate, where nothing fits.
    """
    if config.mesh.fsdp != -1 and config.remat != "auto":
        return config
    check_mesh(config, device_count)  # with the fewest devices that fsdp = -1 may mean
    of_a_replica = device_count // config.mesh.replica
    splits = [2**power for power in range(of_a_replica.bit_length()) if of_a_replica % 2**power == 0]
    remats = ("none", "block") if config.remat == "auto" else (config.remat,)
    if config.mesh.fsdp != -1:
        splits = [config.mesh.fsdp]
    config = config.copy_and_resolve_references()
    if memory is None:
        config.mesh.fsdp, config.remat = splits[0], remats[0]
        return config
    runs: dict[str, tuple[Run, float]] = {}
    for fsdp, remat in itertools.product(splits, remats):
        config.mesh.fsdp, config.remat = fsdp, remat
        if remat not in runs:
            run = assemble(config, parts)
            runs[remat] = run, activations(run, remat=remat == "block")
        mesh = AbstractMesh(check_mesh(config, device_count), AXES)
        wanted = beside + estimate(config, *runs[remat], mesh)
        if wanted <= USABLE * memory:
            logging.info("fsdp %d, remat %r: %.1f GiB a device by the estimate", fsdp, remat, wanted / GIB)
            return config
    raise InputError(
        f"even with config.mesh.fsdp = {fsdp} and config.remat = {remat!r} the run is estimated to "
        f"take {wanted / GIB:.1f} GiB of a device, which has {memory / GIB:.1f}: raise config.accumulate"
    )


def device_memory() -> float | None:
    """Returns the bytes of the first device's memory that JAX may use, or None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def estimate(config: ConfigDict, run: Run, of_an_image: float, mesh: AbstractMesh) -> float:
    """Returns the bytes on each device: state, frozen networks, gradients, and the activations of one pass.

    It counts the largest of the players' backward passes, and of a batch the columns of the terms' own rows;
    `of_an_image` is from `activations`.
    """
    layout = Layout(mesh, config.mesh.rules, run.state_shapes, run.frozen_shapes)
    held = bytes_per_device(run.state_shapes, layout.state) + bytes_per_device(
        run.frozen_shapes, layout.frozen
    )
    # Gradients, and new weights while the old ones are still there.
    updates = 2 * max(
        bytes_per_device(player.params, layout.state.players[name].params)
        for name, player in run.state_shapes.players.items()
    )
    images = config.batch_size / (config.accumulate * mesh.size)
    columns = [column for rows in run.method.rows.values() for column in rows.columns.values()]
    of_a_row = sum(math.prod(column.shape) * jnp.dtype(column.dtype).itemsize for column in columns)
    return held + updates + images * of_an_image + config.batch_size / mesh.size * of_a_row


def activations(run: Run, *, remat: bool) -> float:
    """Returns the bytes that the largest backward pass takes for one image: what is kept, and made again."""
    return max(_of_player(run, player, remat) for player in run.method.players.values())


def _of_player(run: Run, player: Player, remat: bool) -> float:
    one, two = (_kept(run, player, batch) for batch in (1, 2))
    # Weights are kept as well, and do not grow with the batch.
    kept = nbytes(two) - nbytes(one)
    again = (
        _ARRAYS_OF_A_BLOCK * max(nbytes(b) - nbytes(a) for a, b in zip(one, two, strict=True)) if remat else 0
    )
    return kept + again


def _kept(run: Run, player: Player, batch: int) -> list[Any]:
    """Returns the shapes of what a player's forward keeps for its backward pass."""
    x = jax.ShapeDtypeStruct((batch, *run.method.latent_shape), "float32")
    text = jax.tree.map(
        lambda null: jax.ShapeDtypeStruct((batch, *null.shape), null.dtype), run.frozen_shapes["null_text"]
    )

    def forward(params, frozen, x, text, key, columns):
        drawn = player.draw(keys_of_step(key, 0)(player.name), batch, run.method.latent_shape)
        noise = None if player is run.method.student else player.read(columns, drawn)
        return jax.vjp(lambda params: player.forward(params, frozen, x, text, noise), params)[1]

    shapes = run.state_shapes
    params = shapes.players[player.name].params
    columns = abstract_batch(batch, run)
    return jax.tree.leaves(jax.eval_shape(forward, params, run.frozen_shapes, x, text, shapes.key, columns))
