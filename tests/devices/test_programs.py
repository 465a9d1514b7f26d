"""A step in stages, each a program of its own, against the same step as one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from toy_world import Toy, changed, few_step_schedule

from sbv2_jax.devices.programs import Separate
from sbv2_jax.devices.rules import DEFAULT_RULES
from sbv2_jax.devices.sharding import Layout, make_mesh
from sbv2_jax.distill.gradients import FRESH
from sbv2_jax.distill.train_step import make_train_step

FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
CHANGES = {"ema": 0.9, "accumulate": 2, "clip__passes": 2, "score__updates": 3}
STAGES = {
    "begin", "student forward", "vsd prepare", "pull", "student backward",
    "score forward", "score backward", "score update", "update",
}  # fmt: skip
FRESH_STAGES = {"score fresh", "student samples"}


# A student of four steps; with the seed below none of them and two of them come before the one that is trained.
FEW = CHANGES | {"student__schedule": few_step_schedule((999, 749, 499, 249))}


@pytest.fixture(scope="module", params=[{"ema": 0.9}, CHANGES, FEW], ids=["plain", "loops", "few steps"])
def both(request):
    """The state and metrics after three steps of one program, then of stages; and the stages' programs."""
    toy = Toy()
    method = changed(toy.method, **request.param)
    further = method.updates > 1
    batch = jax.tree.map(jnp.asarray, toy.batch | (toy.fresh if further else {}))
    layout = Layout(make_mesh(1, 1, 1, jax.devices()[:1]), DEFAULT_RULES, toy.init(seed=3), toy.frozen)
    programs = Separate(workers=2, options=FAST)
    stages = make_train_step(method, layout.placement, programs)
    placed = dict.fromkeys(toy.batch, layout.placement.batch) | (
        {FRESH: layout.placement.batches} if further else {}
    )
    shapes = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed[name]) for name, a in batch.items()
    }
    planned = stages(*layout.abstract, shapes)
    results = []
    for step in (toy.train_step(**request.param), stages):
        state = jax.device_put(toy.init(seed=3), layout.state)
        frozen = jax.device_put(toy.frozen, layout.frozen)
        for _ in range(3):
            state, metrics = step(state, frozen, jax.device_put(batch, placed))
        results.append((state, metrics))
    few = {"student steps"} if request.param is FEW else set()
    return *results, planned, programs, STAGES | few | (FRESH_STAGES if further else set())


@pytest.mark.slow
def test_stages_give_the_numbers_of_one_program(both):
    (want, want_metrics), (got, got_metrics), *_ = both
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert all(relative_error(a, b) < 1e-5 for a, b in leaves)
    assert got.step == 3 and np.any(got.student["out.kernel"] != got.ema["out.kernel"])
    assert got_metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, rtol=1e-5, err_msg=name)


def test_what_was_planned_is_what_comes_out(both):
    _, (state, metrics), planned, *_ = both
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, metrics))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned)
    assert all(
        leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)
        for leaf, plan in zip(jax.tree.leaves(state), jax.tree.leaves(planned[0]), strict=True)
    )


def test_every_stage_is_compiled_once_however_often_it_runs(both):
    *_, programs, stages = both
    names = programs.compiled().keys()
    assert names >= stages
    helpers = {name.rsplit(", ", 1)[-1] for name in names - stages}
    assert helpers <= {"split", "stack", "sum", "mean", "join"}
