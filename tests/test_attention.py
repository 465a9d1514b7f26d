"""The kernels for attention against XLA's, and when each is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from jax.sharding import NamedSharding, PartitionSpec

from sbv2_jax.models import attention
from sbv2_jax.models.attention import Splash, cudnn, xla
from sbv2_jax.plan.topologies import devices_of
from sbv2_jax.sharding import make_mesh


@pytest.fixture
def splash():
    return Splash(make_mesh(1, 1, 1, jax.devices()[:1]), interpret=True)


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def kernels(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("pallas_call")


@pytest.mark.parametrize("dim", [64, 40])  # of SD 2.1's heads, and of SD 1.5's first level
def test_splash_equals_xla_forward_and_backward(rng, splash, dim):
    query, key, value, weight = (draw(rng, 1, 256, 2, dim) for _ in range(4))

    def loss(core):
        def of(*args):
            out = core(*args)
            return jnp.sum(weight * out), out

        return jax.jit(jax.grad(of, (0, 1, 2), has_aux=True))

    ours, want = loss(splash)(query, key, value), loss(xla)(query, key, value)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "others", "taken"), [(1024, 1024, 1), (64, 64, 0), (256, 77, 0), (320, 320, 0)]
)
def test_splash_takes_long_self_attention_alone(rng, splash, tokens, others, taken):
    query, other = draw(rng, 1, tokens, 2, 8), draw(rng, 1, others, 2, 8)
    assert kernels(splash, query, other, other) == taken


def test_a_core_serves_all_but_causal_attention(rng):
    called = []

    def core(query, key, value):
        called.append(query.shape)
        return xla(query, key, value)

    x = draw(rng, 2, 6, 12)
    got = attention.attention(x, x, x, 3, core=core)
    assert called == [(2, 6, 3, 4)]
    assert np.array_equal(got, attention.attention(x, x, x, 3))
    masked = attention.attention(x, x, x, 3, core=core, causal=True)
    assert len(called) == 1
    assert relative_error(masked[:, -1], got[:, -1]) < 1e-6 and np.abs(masked[:, 0] - got[:, 0]).max() > 1e-2


def test_cudnn_is_asked_only_for_what_it_takes(rng, monkeypatch):
    asked = []
    real = jax.nn.dot_product_attention

    def spy(*args, implementation=None, **kwargs):
        asked.append(implementation)
        return real(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    for dtype, dim in ((jnp.bfloat16, 64), (jnp.float32, 64), (jnp.bfloat16, 160), (jnp.bfloat16, 36)):
        x = draw(rng, 1, 8, 2, dim).astype(dtype)
        cudnn(x, x, x)
    assert asked == ["cudnn", None, None, None]


def test_a_cpu_keeps_to_xla():
    assert attention.choose(make_mesh(1, 1, 1, jax.devices()[:1]), jnp.bfloat16) is None


def test_on_a_tpu_splash_keeps_no_scores():
    """By the real compiler, of forward and backward at 4,096 tokens, as in Stable Diffusion at 512 px."""
    mesh = make_mesh(1, 4, 1, devices_of("v4:2x2x1")[1])
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.ShapeDtypeStruct((4, 4096, 5, 64), jnp.bfloat16, sharding=split)

    def temporaries(core):
        def loss(*args):
            return jnp.sum(core(*args).astype(jnp.float32) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(split,) * 3).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    core = attention.choose(mesh, jnp.bfloat16)
    assert core == Splash(mesh)
    ours, theirs = temporaries(core), temporaries(xla)
    assert theirs > 300 and ours < theirs / 10, (ours, theirs)
