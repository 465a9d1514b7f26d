"""The kernels for attention against XLA's, and when each is taken."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import measured, relative_error
from jax.sharding import NamedSharding, PartitionSpec

from sbv2_jax.devices.sharding import make_mesh
from sbv2_jax.models import attention
from sbv2_jax.models.attention import Cudnn, Splash, xla
from sbv2_jax.plan.topologies import devices_of


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


@pytest.fixture
def asked(monkeypatch):
    """Has XLA do cuDNN's part; returns the shapes and implementations that were asked for."""
    calls = []
    real = jax.nn.dot_product_attention

    def stand_in(query, key, value, *, implementation=None, **kwargs):
        calls.append((query.shape, implementation))
        return real(query, key, value, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return calls


def test_cudnn_is_asked_only_for_what_it_takes(rng, asked):
    core = Cudnn(make_mesh(1, 1, 1, jax.devices()[:1]))
    for dtype, dim in ((jnp.bfloat16, 64), (jnp.float32, 64), (jnp.bfloat16, 160), (jnp.bfloat16, 36)):
        x = draw(rng, 1, 8, 2, dim).astype(dtype)
        core(x, x, x)
    assert [implementation for _, implementation in asked] == ["cudnn", None, None, None]


# The devices must be there before JAX starts, so this runs in a process of its own.
ON_FOUR_DEVICES = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec
from sbv2_jax.models.attention import Cudnn, xla
from sbv2_jax.devices.sharding import make_mesh

mesh = make_mesh(1, 2, 2)
core, batch = Cudnn(mesh), PartitionSpec(mesh.axis_names)

def gradients(core):
    def loss(*args):
        out = core(*args[:3]).astype(jnp.float32)
        return jnp.sum(args[3] * out), out
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

def text(core, of_keys):
    shapes = [
        jax.ShapeDtypeStruct((4, 128, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for spec in (batch, of_keys, of_keys, batch)
    ]
    return gradients(core).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()

fused_attention_stablehlo.check_cudnn_version = lambda: 91000  # there is none here to ask
alone = text(core, batch)
found = {
    "calls": re.findall(r"custom_call @(\\S+)\\(", alone),
    "same": [text(core, batch) == alone, text(core, PartitionSpec("data")).count("custom_call @__cudnn")],
}

real, asked, errors = jax.nn.dot_product_attention, [], []
def stand_in(query, key, value, *, implementation=None, **kwargs):
    asked.append((query.shape[0], implementation))
    return real(query, key, value, **kwargs)
jax.nn.dot_product_attention = stand_in
rng = np.random.default_rng(0)
for size, tokens in ((8, 16), (8, 7), (6, 16)):
    draw = lambda tokens: jnp.asarray(rng.standard_normal((size, tokens, 2, 8)), jnp.bfloat16)
    args = (draw(16), draw(tokens), draw(tokens), draw(16))
    ours = gradients(core)(*args)
    count = len(asked)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients(xla)(*args)), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        errors.append(float(np.abs(got - want).max() / np.abs(want).max()))
    del asked[count:]
print(json.dumps(found | {"asked": asked, "error": max(errors)}))
"""


@pytest.fixture(scope="module")
def on_four_devices() -> dict:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_each_of_several_gpus_calls_cudnn_on_its_own_part(on_four_devices):
    """The program as it would go to GPUs holds the calls themselves, and nothing that differs from run to run."""
    assert on_four_devices["calls"] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert on_four_devices["same"] == [True, 2], "with keys that are split unlike queries, too"


def test_cudnn_over_devices_equals_xla_forward_and_backward(on_four_devices):
    """Of 8 samples each of four devices gets 2; 6 they do not divide, and XLA takes them."""
    assert on_four_devices["asked"] == [[2, "cudnn"], [2, "cudnn"], [6, None]]
    assert measured(on_four_devices["error"]) < 1e-2  # of bfloat16


def test_a_gpu_gets_cudnn_where_it_works(asked, monkeypatch):
    """Tried forward and backward, by one process on one of its devices; a GPU is all that is made up here."""
    gpus = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform="gpu")] * 4), local_devices=jax.devices()
    )
    assert attention.choose(gpus, jnp.float32) is None and asked == []
    assert attention.choose(gpus, jnp.bfloat16) == Cudnn(gpus)
    assert asked == [((1, 128, 1, 64), "cudnn")]

    def fails(*_, **__):
        raise RuntimeError("cuDNN is not detected.\nand more")

    monkeypatch.setattr(jax.nn, "dot_product_attention", fails)
    assert attention.choose(gpus, jnp.bfloat16) is None


def test_a_cpu_keeps_to_xla():
    assert attention.choose(make_mesh(1, 1, 1, jax.devices()[:1]), jnp.bfloat16) is None


@pytest.mark.slow
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
