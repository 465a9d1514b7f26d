"""The blocks that UNet and autoencoder share against diffusers: same random weights, same random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers.models.downsampling import Downsample2D as TorchDownsample
from diffusers.models.resnet import ResnetBlock2D as TorchResnet
from diffusers.models.upsampling import Upsample2D as TorchUpsample
from parity import BOUND, nchw, nhwc, params_of, randomised

from sbv2_jax.models.network import Network
from sbv2_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from sbv2_jax.tree import cast


@pytest.mark.parametrize("out_channels", [24, 36])
@pytest.mark.parametrize("time_channels", [None, 20])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_resnet_block_equals_diffusers(out_channels, time_channels, scale, rng):
    """At scale 1e-3 the variance is about epsilon, so that a wrong epsilon shows."""
    torch.manual_seed(0)
    theirs = randomised(
        TorchResnet(
            in_channels=24, out_channels=out_channels, temb_channels=time_channels, groups=6, eps=1e-6
        )
    )
    ours = Network(
        lambda rngs: ResnetBlock2D(
            24, out_channels, groups=6, epsilon=1e-6, time_channels=time_channels, rngs=rngs
        )
    )
    x = scale * rng.standard_normal((2, 7, 5, 24), np.float32)
    emb = None if time_channels is None else rng.standard_normal((2, time_channels), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x), None if emb is None else torch.from_numpy(emb))
    assert relative_error(ours.apply(params_of(theirs, ours), x, emb), nhwc(want)) < BOUND


def test_resnet_block_follows_its_activation(rng):
    torch.manual_seed(1)
    theirs = randomised(
        TorchResnet(in_channels=8, temb_channels=None, groups=2, eps=1e-5, non_linearity="gelu")
    )
    ours = Network(lambda rngs: ResnetBlock2D(8, 8, groups=2, epsilon=1e-5, activation="gelu", rngs=rngs))
    x = rng.standard_normal((1, 4, 4, 8), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x), None)
    assert relative_error(ours.apply(params_of(theirs, ours), x), nhwc(want)) < BOUND


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(8, 6), (7, 8), (5, 9)])
def test_downsample_equals_diffusers(padding, size, rng):
    torch.manual_seed(2)
    theirs = randomised(TorchDownsample(12, use_conv=True, out_channels=20, padding=padding, name="op"))
    ours = Network(lambda rngs: Downsample2D(12, 20, padding=padding, rngs=rngs))
    x = rng.standard_normal((2, *size, 12), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x))
    assert relative_error(ours.apply(params_of(theirs, ours), x), nhwc(want)) < BOUND


def test_upsample_equals_diffusers(rng):
    torch.manual_seed(3)
    theirs = randomised(TorchUpsample(12, use_conv=True, out_channels=20))
    ours = Network(lambda rngs: Upsample2D(12, 20, rngs))
    x = rng.standard_normal((2, 5, 4, 12), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x))
    assert relative_error(ours.apply(params_of(theirs, ours), x), nhwc(want)) < BOUND


@pytest.mark.parametrize(
    "build",
    [
        lambda rngs: ResnetBlock2D(8, 12, groups=4, epsilon=1e-6, time_channels=6, rngs=rngs),
        lambda rngs: Downsample2D(8, 12, padding=0, rngs=rngs),
        lambda rngs: Upsample2D(8, 12, rngs),
    ],
)
def test_arithmetic_follows_the_parameters(build, rng):
    network = Network(build)
    params = {
        name: jnp.asarray(rng.standard_normal(shape.shape), jnp.bfloat16)
        for name, shape in network.shapes.items()
    }
    x = jnp.asarray(rng.standard_normal((2, 4, 4, 8)), jnp.bfloat16)
    inputs = (x, x[:, 0, 0, :6]) if "time_emb_proj.kernel" in params else (x,)
    got = jax.jit(network.apply)(params, *inputs)
    assert got.dtype == jnp.bfloat16
    want = jax.jit(network.apply)(cast(params, jnp.float32), *cast(inputs, jnp.float32))
    assert relative_error(got, want) < 0.05
