"""Planning for hardware that is not here: FLOPs, memory, collectives, and the real TPU compiler's verdict."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.models.attention_processor import AttnProcessor
from jax.sharding import NamedSharding, PartitionSpec
from tiny_pipeline import SMALL_UNET, write_pipeline
from torch.utils.flop_counter import FlopCounterMode

from sbv2_jax.devices.sharding import bytes_per_device, make_mesh
from sbv2_jax.errors import InputError
from sbv2_jax.models.registry import network
from sbv2_jax.models.unet import UNetConfig
from sbv2_jax.plan import plan
from sbv2_jax.plan.advice import advise, changed, remedies
from sbv2_jax.plan.cost import ARITHMETIC, LINKS, MEMORY, NETWORK, at_scale, step_time
from sbv2_jax.plan.flops import count_flops
from sbv2_jax.plan.hlo import collective_bytes, largest_arrays
from sbv2_jax.plan.memory import Need, Recorded, needs
from sbv2_jax.plan.report import text_of
from sbv2_jax.plan.topologies import CHIPS, devices_of
from sbv2_jax.run.batches import abstract_batch
from sbv2_jax.run.build import assemble
from sbv2_jax.run.compilation import lay_out
from sbv2_jax.run.components import read_parts
from sbv2_jax.run.config import default_config
from sbv2_jax.tree import GIB

pytestmark = pytest.mark.slow

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

    def branches(x, w, count):
        def body(total, number):
            taken = number < count
            return jax.lax.cond(
                taken, lambda total: total + product(x * total[0, 0], w), lambda total: total, total
            ), None

        return jax.lax.scan(body, jnp.ones((64, 256)), jnp.arange(7))[0]

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    assert collective_bytes(compiled(branches, x, w, count))["all-reduce"] == 7 * 64 * 256 * 4 // 2

    text = re.sub(r"condition=[^,]*, ", "", compiled(loop, x, w))
    with pytest.raises(ValueError, match="a loop without a condition: "):
        collective_bytes(text)


def test_the_largest_arrays_are_named_by_what_makes_them():
    def function(x):
        return jnp.sum(jnp.sin(jnp.outer(x, x)).at[3, 4].set(2.0) @ jnp.outer(x, x))

    largest = largest_arrays(compiled(function, shape(300)), 2)
    assert largest[0].bytes == 300 * 300 * 4 and largest[0].shape == "f32[300,300]"
    assert largest[0].operation


def test_what_a_fusion_computes_inside_is_no_array():
    """TPUs of this generation compute elementwise in float32, inside the fusion with the product."""
    _, devices = devices_of("v5e:2x2")
    whole = NamedSharding(make_mesh(1, 4, 1, devices), PartitionSpec())
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=whole)
    text = (
        jax.jit(lambda x, w: jax.nn.gelu(x @ w + 1) * x, out_shardings=whole).lower(x, x).compile().as_text()
    )
    assert "f32[2048,2048]" in text
    shapes = [buffer.shape for buffer in largest_arrays(text, 5)]
    assert shapes[0] == "bf16[2048,2048]" and "f32[2048,2048]" not in shapes


# Topologies and plans


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v4", "unknown topology 'v4'"),
        ("v3:2x2", "of v4, v5e, v5p, v6e, tpu7x"),
        ("v4:2x2x1;", "unknown topology"),
        ("v4:2x2x1*", "v4:2x2x4\\*2 for two slices"),
        ("v4:3x5x7", "topology 'v4:3x5x7' cannot be had"),
    ],
)
def test_a_topology_that_is_not_one(topology, says):
    with pytest.raises(InputError, match=says):
        devices_of(topology)


def test_remedies_take_less_memory_one_after_the_other():
    config = default_config()
    config.update(batch_size=128, accumulate=2)
    found = list(remedies(config, devices=16))
    assert found[0] == {"remat": "block"}
    assert found[1:4] == [{"remat": "block", "mesh.fsdp": fsdp} for fsdp in (2, 4, 8)]
    assert found[4:] == [
        {"remat": "block", "mesh.fsdp": 8, "accumulate": accumulate} for accumulate in (4, 8)
    ]
    for changes in found:
        plan.validate(changed(config, changes))


def made_plan(peak: float, **programs: plan.Program) -> plan.Plan:
    return plan.Plan(
        topology="v4:2x2x1",
        chip=CHIPS["v4"],
        mesh={"replica": 1, "data": 2, "fsdp": 2},
        batch_size=16,
        flops=4e12,
        gradient_bytes=1000,
        seconds=1.0,
        peak=peak,
        programs=programs,
        generate=None,
    )


def test_advice_ends_with_the_first_change_that_fits():
    config = default_config()
    config.update(batch_size=128, remat="block")
    once = plan.Program(calls=1, need=Need(0, 0, 0, 0), accessed=0.0, collectives={}, buffers=[])
    compiled = []

    def compile_(config):
        compiled.append((config.mesh.fsdp, config.accumulate))
        return made_plan((40 if config.mesh.fsdp < 4 else 20) * GIB, step=once)

    found = list(advise(config, 16, compile_))
    assert [changes for changes, _ in found] == [{"mesh.fsdp": 2}, {"mesh.fsdp": 4}]
    assert [plan.fits for _, plan in found] == [False, True] and compiled == [(2, 1), (4, 1)]
    assert config.mesh.fsdp == 1


def test_a_program_that_runs_twice_counts_twice():
    def program(calls):
        need = Need(arrays=5 * GIB, temporaries=GIB, results=GIB, code=0)
        return plan.Program(
            calls=calls,
            need=need,
            accessed=8e9,
            collectives={"all-gather": GIB, "all-reduce": 10, "reduce-scatter": 3},
            buffers=[],
        )

    found = made_plan(8 * GIB, begin=program(1), score=program(3))
    assert found.collectives == {"all-gather": 4 * GIB, "all-reduce": 40, "reduce-scatter": 12}
    time = step_time(found)
    assert time.arithmetic == pytest.approx(1e12 / (ARITHMETIC * 275e12))
    assert time.memory == pytest.approx(4 * 8e9 / (MEMORY * 1.2e12))
    assert time.links == pytest.approx(0.75 * (4 * GIB + 2 * 40 + 2 * 12) / (LINKS * 300e9))
    assert time.total == time.memory + time.links and time.bound == "memory"


def test_weak_scaling_adds_the_network_where_one_slice_is_not_enough():
    once = plan.Program(
        calls=1, need=Need(0, 0, 0, 0), accessed=8e9, collectives={"all-reduce": GIB}, buffers=[]
    )
    found = made_plan(8 * GIB, step=once)
    here, most, more = (at_scale(found, devices) for devices in (4, 4096, 8192))
    assert here == step_time(found)
    assert most.links == pytest.approx(here.links * (4095 / 4096) / (3 / 4)) and most.network == 0
    assert more.links == pytest.approx(most.links)
    assert more.network == pytest.approx(2 * 0.5 * 1000 / (LINKS * NETWORK))


def test_what_the_compiler_says_of_a_program_that_is_too_large():
    _, devices = devices_of("v5e:2x2")
    whole = NamedSharding(make_mesh(1, 4, 1, devices), PartitionSpec())
    x = shape(2**16, 2**16, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: jnp.sort(x, 0) @ x, out_shardings=whole).lower(x).compile()
    assert plan.wanted_bytes(raised.value) > 2 * x.size
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded"
    assert plan.wanted_bytes(jax.errors.JaxRuntimeError(said)) == 20.5 * GIB
    with pytest.raises(InputError, match="the step does not compile: INTERNAL: a bug"):
        plan.wanted_bytes(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


def test_each_replica_is_a_slice_of_its_own():
    _, devices = devices_of("v4:2x2x1*2")
    mesh = make_mesh(2, 2, 2, devices)
    assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="config.mesh.replica = 4 does not fit the 2 slices"):
        make_mesh(4, 1, 2, devices)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_pipeline(directory, blocks=SMALL_UNET)
    return directory


def tiny(world: Path, **changes):
    config = default_config()
    config.update(teacher=str(world / "pipeline"), batch_size=16, precision="bfloat16", programs="stages")
    config.update_from_flattened_dict({"score.rank": 2, "mesh.fsdp": 2, **changes})
    return config


def test_the_flops_of_a_step_grow_by_those_of_each_further_update(world):
    """A forward of the student more, and a forward and backward pass of the score model."""
    counted = []
    for updates in (1, 2, 3, 6):
        config = tiny(world, **{"score.updates_per_step": updates})
        counted.append(plan.step_flops(config, assemble(config, read_parts(config))))
    further = counted[1] - counted[0]
    assert counted == [counted[0] + count * further for count in (0, 1, 2, 5)]
    assert 2 < counted[0] / further < 5, (
        "the student's backward pass is of all weights, and there are the guided rows"
    )


def test_the_flops_of_a_step_grow_by_the_steps_that_are_simulated_on_average(world):
    """Of two steps half a forward of the student, of four one and a half; and so for the samples of each update."""

    def flops(*timesteps, **changes):
        config = tiny(world, **{"student.timesteps": timesteps, **changes})
        run = assemble(config, read_parts(config))
        return plan.step_flops(config, run), run

    one, run = flops()
    student, text = run.method.student, run.frozen_shapes["null_text"]
    z = jax.ShapeDtypeStruct((16, *run.method.latent_shape), jnp.float32)
    text = jax.tree.map(lambda null: jax.ShapeDtypeStruct((16, *null.shape), null.dtype), text)
    forward = count_flops(student.forward, run.state_shapes.student, run.frozen_shapes, z, text)
    assert flops(999, 499)[0] - one == forward / 2
    assert flops(999, 749, 499, 249)[0] - one == 1.5 * forward
    more = {"score.updates_per_step": 3}
    assert flops(999, 499, **more)[0] - flops(**more)[0] == 1.5 * forward


@pytest.mark.parametrize(
    ("topology", "updates", "timesteps"),
    [("v4:2x2x1", 1, ()), ("v5e:2x2", 3, ()), ("v5p:2x2x1", 1, ()), ("v6e:2x2", 1, (999, 749, 499, 249))],
)
def test_a_step_compiles_for_a_topology(world, topology, updates, timesteps):
    config = tiny(world, **{"score.updates_per_step": updates, "student.timesteps": timesteps})
    if updates > 1 and not timesteps:
        config.terms = ("vsd", "regression")
        config.pairs.path = "pairs that are elsewhere"
    found = plan.compile_for(config, topology)
    _, run, layout = lay_out(config, read_parts(config), devices_of(topology)[1], None)
    calls = {name: program.calls for name, program in found.programs.items()}
    assert calls["score forward"] == calls["score update"] == updates
    assert calls.get("student samples", 0) == updates - 1 and calls["student forward"] == 1
    assert calls.get("student steps", 0) == (updates if timesteps else 0)
    held = (*layout.abstract, abstract_batch(16, run, layout.mesh))
    once = sum(bytes_per_device(leaf, leaf.sharding) for leaf in jax.tree.leaves(held))
    assert found.programs["begin"].need.arrays == once
    assert found.fits and found.devices == 4 and found.mesh == {"replica": 1, "data": 2, "fsdp": 2}
    assert found.peak == max(program.need.total for program in found.programs.values())
    assert 0.001 < found.peak / GIB < 0.5 and found.chip is CHIPS[topology.split(":")[0]]
    assert sum(found.collectives.values()) > 0, "gradients are summed over devices"
    assert "fits: " in text_of(found)
    assert 0 < found.generate.need.arrays < once, "the networks of one student, and nothing of its training"


def test_two_devices_of_a_chip_compile_a_step_together(world):
    """TPU v7: eight devices of 2 x 2 x 1 chips, of which each has half a chip's memory."""
    found = plan.compile_for(tiny(world, **{"mesh.fsdp": 4}), "tpu7x:2x2x1")
    assert found.fits and found.mesh == {"replica": 1, "data": 2, "fsdp": 4}
    assert found.chip is CHIPS["tpu7x"] and sum(found.collectives.values()) > 0
    _, devices = devices_of("tpu7x:2x2x1")
    whole = NamedSharding(make_mesh(1, 8, 1, devices), PartitionSpec())
    x = shape(2**17, 2**17, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"exceeds available HBM \(94\.75G\)"):
        jax.jit(lambda x: jnp.sort(x, 0) @ x, out_shardings=whole).lower(x).compile()
