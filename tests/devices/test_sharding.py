"""Specs by rule, on an abstract mesh: no device is needed to say what goes where."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sbv2_jax.devices.sharding import AXES, Layout, bytes_per_device, matches, shardings
from sbv2_jax.errors import InputError

MESH = AbstractMesh((1, 2, 4), AXES)


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


TREE = {
    "conv.kernel": shape(3, 3, 320, 640),
    "dense.kernel": shape(512, 128),
    "odd.kernel": shape(511, 333),
    "odd_in.kernel": shape(510, 256),
    "norm.scale": shape(320),
    "count": shape(),
}


def test_the_largest_divisible_dimension_of_a_large_leaf_is_split():
    specs = {name: sharding.spec for name, sharding in shardings(TREE, MESH).items()}
    assert specs == {
        "conv.kernel": PartitionSpec(None, None, None, "fsdp"),
        "dense.kernel": PartitionSpec("fsdp"),
        "odd.kernel": PartitionSpec(),
        "odd_in.kernel": PartitionSpec(None, "fsdp"),
        "norm.scale": PartitionSpec(),
        "count": PartitionSpec(),
    }


def test_bytes_per_device_count_the_shards():
    split = 3 * 3 * 320 * 640 + 512 * 128 + 510 * 256
    whole = 511 * 333 + 320 + 1
    assert bytes_per_device(TREE, shardings(TREE, MESH)) == 4 * (split // 4 + whole)


def test_the_first_rule_that_matches_wins_and_matches_are_counted():
    rules = ((r"conv.*", "replicate"), (r".*\.kernel", "fsdp"), (r".*", "replicate"))
    specs = shardings(TREE, MESH, rules)
    assert specs["conv.kernel"].spec == PartitionSpec()
    assert specs["dense.kernel"].spec == PartitionSpec("fsdp")
    assert matches(TREE, rules) == {r"conv.*": 1, r".*\.kernel": 3, r".*": 2}


def test_a_leaf_without_a_rule_and_an_unknown_strategy_are_errors():
    with pytest.raises(InputError, match="count, norm.scale"):
        shardings(TREE, MESH, ((r".*\.kernel", "fsdp"),))
    with pytest.raises(InputError, match="'tensor' is neither"):
        shardings(TREE, MESH, ((r".*", "data+tensor"),))


def test_a_leaf_may_be_split_over_several_axes():
    specs = shardings(TREE, MESH, ((r".*", "data+fsdp"),))
    assert specs["dense.kernel"].spec == PartitionSpec(("data", "fsdp"))
    assert specs["dense.kernel"].shard_shape((512, 128)) == (64, 128)
    assert specs["odd.kernel"].spec == PartitionSpec()


def test_the_rules_of_a_layout_see_the_whole_run_and_none_is_idle():
    state, frozen = {"student": TREE}, {"teacher": TREE}
    rules = ((r"frozen\.teacher\..*", "data"), (r".*", "fsdp"))
    layout = Layout(MESH, rules, state, frozen)
    assert layout.state["student"]["dense.kernel"].spec == PartitionSpec("fsdp")
    assert layout.frozen["teacher"]["dense.kernel"].spec == PartitionSpec("data")
    assert layout.matches() == {r"frozen\.teacher\..*": 6, r".*": 6}
    with pytest.raises(InputError, match=r"no leaf of the run is the first to match teacher"):
        Layout(MESH, ((r"teacher\..*", "data"), *rules), state, frozen)
