"""Planning for hardware that is not here: FLOPs, memory, collectives, and the real TPU compiler's verdict."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.models.attention_processor import AttnProcessor
from jax.sharding import NamedSharding, PartitionSpec
from tiny_pipeline import write_pipeline
from torch.utils.flop_counter import FlopCounterMode

from sbv2_jax.config import default_config
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.plan import plan
from sbv2_jax.plan.flops import count_flops
from sbv2_jax.plan.hlo import collective_bytes, largest_arrays
from sbv2_jax.plan.memory import Recorded, needs
from sbv2_jax.plan.report import text_of
from sbv2_jax.plan.topologies import CHIPS, GIB, devices_of
from sbv2_jax.sharding import make_mesh

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}


def shape(*dims: int, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)


# FLOPs


def test_flops_of_a_forward_equal_pytorchs_count():
    net = network(UNetConfig.from_dict({"_class_name": "UNet2DConditionModel", **SMALL, "sample_size": 8}))
    ours = count_flops(
        net.apply, net.shapes, shape(3, 8, 8, 4), jax.ShapeDtypeStruct((3,), jnp.int32), shape(3, 5, 12)
    )
    theirs = TorchUNet(**SMALL, sample_size=8)
    theirs.set_attn_processor(AttnProcessor())  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.randn(3, 5, 12))
    assert ours == counter.get_total_flops()


def test_flops_of_loops_and_gradients():
    weight, x = shape(8, 4), shape(16, 8)
    once = count_flops(jnp.matmul, x, weight)
    assert once == 2 * 16 * 8 * 4
    assert (
        count_flops(lambda x, w: jax.lax.scan(lambda c, _: (c, x @ w), 0, length=5)[1], x, weight) == 5 * once
    )
    both = count_flops(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1)), x, weight)
    assert both == 3 * once


# Memory


def test_memory_counts_an_array_from_the_call_that_makes_it_to_the_last_that_takes_it():
    here = NamedSharding(make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())
    programs = Recorded()

    def run(name, function, *args):
        return programs.run(name, function, *args, out=here)

    weights = shape(1000, sharding=here)  # 4,000 bytes
    x = run("first", lambda w: w[:100] * 2, weights)  # 400
    y = run("second", lambda x: jnp.tile(x, 5), x)  # 2,000; x is still wanted
    z = run("third", lambda y: y[:10], y)  # 40
    run("fourth", lambda x, z: x[:10] + z, x, z)
    found = needs(programs, weights)
    assert [found[name].arrays for name in ("first", "second", "third", "fourth")] == [4000, 4400, 6400, 4440]
    assert [found[name].results for name in ("first", "second", "third", "fourth")] == [400, 2000, 40, 40]
    assert found["second"].total == sum(vars(found["second"]).values())


def test_a_program_of_several_calls_counts_with_the_largest():
    here = NamedSharding(make_mesh(1, 1, 1, jax.devices()[:1]), PartitionSpec())
    programs = Recorded()
    a, b = shape(10, sharding=here), shape(10, sharding=here)
    kept = programs.run("same", lambda a: a + 1, a, out=here)
    programs.run("other", lambda b: jnp.tile(b, 3), b, out=here)
    programs.run("same", lambda a: a + 1, b, out=here)
    programs.run("last", lambda a, b: a + b, kept, b, out=here)
    assert needs(programs, ())["same"].arrays == 80


# What a program's text tells


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_collectives_are_counted_with_the_trips_of_their_loops():
    _, devices = devices_of("v4:2x2x1")
    mesh = make_mesh(1, 1, 4, devices)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    x, w = (
        shape(64, 512, sharding=split),
        shape(512, 256, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))),
    )
    whole = NamedSharding(mesh, PartitionSpec())

    def product(x, w):
        return jax.lax.with_sharding_constraint(x @ w, whole)

    assert collective_bytes(compiled(product, x, w)) == {"all-reduce": 64 * 256 * 4}

    def loop(x, w):
        def body(total, factor):
            return total + product(x * factor * jnp.cos(total[0, 0]), w), None

        return jax.lax.scan(body, jnp.zeros((64, 256)), jnp.arange(7.0))[0]

    assert collective_bytes(compiled(loop, x, w))["all-reduce"] == 7 * 64 * 256 * 4


def test_the_largest_arrays_are_named_by_what_makes_them():
    def function(x):
        return jnp.sum(jnp.sin(jnp.outer(x, x)).at[3, 4].set(2.0) @ jnp.outer(x, x))

    largest = largest_arrays(compiled(function, shape(300)), 2)
    assert largest[0].bytes == 300 * 300 * 4 and largest[0].shape == "f32[300,300]"
    assert largest[0].operation


# Topologies and plans


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v4", "unknown topology 'v4'"),
        ("v3:2x2", "of v4, v5e, v5p, v6e"),
        ("v4:2x2x1;", "unknown topology"),
        ("v4:3x5x7", "topology 'v4:3x5x7' cannot be had"),
    ],
)
def test_a_topology_that_is_not_one(topology, says):
    with pytest.raises(InputError, match=says):
        devices_of(topology)


def test_remedies_take_less_memory_one_after_the_other():
    config = default_config()
    config.update(batch_size=128, accumulate=2)
    found = list(plan.remedies(config, devices=16))
    assert found[0] == {"remat": "block"}
    assert found[1:4] == [{"remat": "block", "mesh.fsdp": fsdp} for fsdp in (2, 4, 8)]
    assert found[4:] == [
        {"remat": "block", "mesh.fsdp": 8, "accumulate": accumulate} for accumulate in (4, 8)
    ]
    for changes in found:
        plan.validate(plan.changed(config, changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_pipeline(directory)
    return directory


def tiny(world: Path, **changes):
    config = default_config()
    config.update(teacher=str(world / "pipeline"), batch_size=16, precision="bfloat16", programs="stages")
    config.update_from_flattened_dict({"score.rank": 2, "mesh.fsdp": 2, **changes})
    return config


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v6e:2x2"])
def test_a_step_compiles_for_a_topology(world, topology):
    found = plan.compile_for(tiny(world), topology)
    assert found.fits and found.devices == 4 and found.mesh == {"replica": 1, "data": 2, "fsdp": 2}
    assert found.peak == max(program.need.total for program in found.programs.values())
    assert 0.001 < found.peak / GIB < 0.5 and found.chip is CHIPS[topology.split(":")[0]]
    assert sum(found.collectives.values()) > 0, "gradients are summed over devices"
    assert "fits: " in text_of(found)
