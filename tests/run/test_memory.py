"""The estimate of a run's memory, and what is chosen by it."""

import jax
import pytest
from jax.sharding import AbstractMesh
from tiny_pipeline import write_pipeline

from sbv2_jax.devices.sharding import AXES
from sbv2_jax.errors import InputError
from sbv2_jax.run import memory_estimate as memory
from sbv2_jax.run.build import assemble
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.tree import nbytes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The configuration of a tiny run and its parts; even its leaves are split."""
    directory = tmp_path_factory.mktemp("world")
    write_pipeline(directory)
    config = default_config()
    config.update(teacher=str(directory / "pipeline"), batch_size=64)
    config.score.update(rank=2)
    return config, read_parts(config)


@pytest.fixture(autouse=True)
def small_leaves_are_split(monkeypatch):
    monkeypatch.setattr("sbv2_jax.devices.sharding.SMALLEST_SPLIT", 16)


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def estimated(config, parts, *mesh):
    run = assemble(config, parts)
    of_an_image = memory.activations(run, remat=config.remat == "block")
    return memory.estimate(config, run, of_an_image, AbstractMesh(mesh, AXES))


@pytest.mark.slow
def test_the_estimate_is_what_is_held_and_what_grows_with_the_batch(world):
    config, parts = world
    run = assemble(config, parts)
    held = nbytes((run.state_shapes, run.frozen_shapes)) + 2 * nbytes(run.state_shapes.student)
    one = memory.activations(run, remat=False)
    assert estimated(config, parts, 1, 1, 1) == held + 64 * one
    assert estimated(config, parts, 1, 8, 1) == held + 8 * one
    assert estimated(changed(config, accumulate=4), parts, 1, 1, 1) == held + 16 * one
    pairs = changed(config, terms=("vsd", "regression"), pairs__path="anywhere")
    of_a_row = 4 + 4 + 4 * 8 * 8 * 4
    assert estimated(pairs, parts, 1, 8, 1) == held + 8 * (one + of_a_row)
    split = estimated(config, parts, 1, 1, 8) - 8 * one
    assert held / 8 < split < held / 4, "most leaves are split over eight"


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_is_what_jax_keeps(world):
    config, parts = world
    run = assemble(config, parts)
    side, channels = run.method.latent_shape[0], 16
    kept = memory.activations(run, remat=False)
    assert kept > 20 * 4 * side * side * channels, "tens of arrays of the first level's size"
    again = assemble(changed(config, remat="block"), parts)
    largest = memory._ARRAYS_OF_A_BLOCK * 4 * side * side * channels
    assert memory.activations(again, remat=True) < kept + largest
    assert memory.activations(again, remat=False) < 0.6 * kept


@pytest.mark.slow
def test_the_weights_are_split_over_as_few_devices_as_need_be(world):
    config, parts = world
    config = changed(config, mesh__fsdp=-1)
    needed = {fsdp: estimated(config, parts, 1, 8 // fsdp, fsdp) for fsdp in (1, 2, 4, 8)}
    assert list(needed.values()) == sorted(needed.values(), reverse=True)
    for fsdp, wanted in needed.items():
        assert memory.fit(config, parts, 8, 1.01 * wanted / memory.USABLE).mesh.fsdp == fsdp
    # Judges take what one split more gives back.
    judges = needed[1] - needed[2]
    assert memory.fit(config, parts, 8, 1.01 * needed[1] / memory.USABLE, judges).mesh.fsdp == 2
    with pytest.raises(InputError, match=r"even with config.mesh.fsdp = 8 .* raise config.accumulate"):
        memory.fit(config, parts, 8, 0.9 * needed[8] / memory.USABLE)


@pytest.mark.parametrize("bytes_limit", [None, 1e12])
def test_replicas_that_the_devices_do_not_make_are_refused(world, bytes_limit):
    config, parts = world
    for replica, devices in ((2, 1), (3, 8)):
        with pytest.raises(InputError, match=f"= {replica} x 1 does not divide the {devices} devices"):
            memory.fit(changed(config, mesh__fsdp=-1, mesh__replica=replica), parts, devices, bytes_limit)


@pytest.mark.slow
def test_activations_are_recomputed_where_that_saves_a_split(world):
    config, parts = world
    config = changed(config, mesh__fsdp=-1, remat="auto", batch_size=1024)
    plain, block = (estimated(changed(config, remat=remat), parts, 1, 8, 1) for remat in ("none", "block"))
    assert block < plain
    roomy = memory.fit(config, parts, 8, 1.01 * plain / memory.USABLE)
    tight = memory.fit(config, parts, 8, 1.01 * block / memory.USABLE)
    assert (roomy.mesh.fsdp, roomy.remat) == (1, "none")
    assert (tight.mesh.fsdp, tight.remat) == (1, "block")


def test_a_device_that_does_not_say_its_memory_takes_everything(world):
    config, parts = world
    found = memory.fit(changed(config, mesh__fsdp=-1, remat="auto"), parts, 4, None)
    assert (found.mesh.fsdp, found.remat) == (1, "none")
    assert memory.fit(config, parts, 4, 1.0) is config, "nothing was left open"
    assert memory.device_memory() is None or jax.default_backend() != "cpu"
