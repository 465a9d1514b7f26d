"""The KL autoencoder against diffusers: same random weights, same random inputs, block by block and whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderKL as TorchVAE
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D as TorchDown
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D as TorchMid
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D as TorchUp
from parity import BOUND, nchw, nhwc, params_of, randomised

from sbv2_jax.convert.formats.names import torch_name
from sbv2_jax.errors import InputError
from sbv2_jax.models.network import Network
from sbv2_jax.models.vae import (
    Attention,
    AutoencoderKL,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
    VAEConfig,
)
from sbv2_jax.tree import cast, count


def levels(*widths: int) -> dict:
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


# The published files of SD 1.x, SD 2.1 and SDXL differ in these fields only.
SD15 = {**levels(128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
SD21 = {**SD15, "sample_size": 768, "scaling_factor": 0.18215}
SDXL = {**SD15, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
CASES = {
    "sd, narrow": ({**SD15, **levels(16, 32, 48, 48), "norm_num_groups": 8}, (40, 24)),
    "odd widths, three layers, size that 2 does not divide": (
        {**levels(18, 6), "layers_per_block": 3, "norm_num_groups": 6, "latent_channels": 5},
        (19, 14),
    ),
    "one layer a block, no mid attention, no quant convolutions, other channels and activation": (
        {
            **levels(16, 24),
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "in_channels": 4,
            "out_channels": 2,
            "act_fn": "gelu",
        },
        (12, 16),
    ),
}


ONE_LEVEL = {**levels(8), "norm_num_groups": 4, "use_post_quant_conv": False}


def pair(values: dict) -> tuple[TorchVAE, Network]:
    torch.manual_seed(0)
    theirs = randomised(TorchVAE.from_config(values))
    config = VAEConfig.from_dict(dict(theirs.config))
    return theirs, Network(lambda rngs: AutoencoderKL(config, rngs))


def errors(theirs: TorchVAE, ours: Network, size: tuple[int, int], rng) -> dict[str, float]:
    params = params_of(theirs, ours)
    images = rng.uniform(-1, 1, (2, *size, theirs.config.in_channels)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(nchw(images)).latent_dist
    mean, log_variance = jax.jit(lambda p, x: ours.apply(p, x, method="encode"))(params, images)
    latents = rng.standard_normal(mean.shape, np.float32)
    with torch.no_grad():
        decoded = theirs.decode(nchw(latents)).sample
    got = jax.jit(lambda p, x: ours.apply(p, x, method="decode"))(params, latents)
    return {
        "mean": relative_error(mean, nhwc(posterior.mean)),
        "log-variance": relative_error(log_variance, nhwc(posterior.logvar)),
        "decoded": relative_error(got, nhwc(decoded)),
    }


@pytest.mark.parametrize("case", CASES)
def test_whole_network_equals_diffusers(case, rng):
    values, size = CASES[case]
    found = errors(*pair(values), size, rng)
    print(case, found)
    assert max(found.values()) < BOUND


@pytest.mark.slow
def test_stable_diffusion_widths_equal_diffusers(rng):
    found = errors(*pair(SD21), (64, 64), rng)
    print(found)
    assert max(found.values()) < BOUND


def test_log_variance_is_clamped(rng):
    theirs, ours = pair(ONE_LEVEL)
    with torch.no_grad():
        theirs.quant_conv.weight *= 20
        theirs.quant_conv.bias[4:] += torch.tensor([-200.0, -30.0, 20.0, 200.0])
    images = rng.uniform(-1, 1, (1, 6, 6, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs.encode(nchw(images)).latent_dist.logvar
    _, got = jax.jit(lambda p, x: ours.apply(p, x, method="encode"))(params_of(theirs, ours), images)
    assert relative_error(got, nhwc(want)) < BOUND
    assert np.all(got[..., 0] == -30) and np.all(got[..., 3] == 20)
    assert np.unique(got[..., 1]).size > 2 and np.unique(got[..., 2]).size > 2


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("kind", ["attention", "mid", "down", "last down", "up", "last up"])
def test_block_equals_diffusers(kind, scale, rng):
    """At scale 1e-3 the variance is about epsilon, so that a wrong epsilon shows."""
    torch.manual_seed(1)
    config = VAEConfig.from_dict({**levels(16, 24), "norm_num_groups": 8, "layers_per_block": 2})
    shared = {"resnet_eps": 1e-6, "resnet_groups": 8}
    mid = TorchMid(24, None, attention_head_dim=24, **shared)
    more = not kind.startswith("last")
    if kind == "attention":
        theirs, build = mid.attentions[0], lambda rngs: Attention(24, 8, rngs)
    elif kind == "mid":
        theirs, build = mid, lambda rngs: UNetMidBlock2D(config, rngs)
    elif kind.endswith("down"):
        theirs = TorchDown(24, 16, num_layers=2, add_downsample=more, downsample_padding=0, **shared)
        build = lambda rngs: DownEncoderBlock2D(24, 16, config, downsample=more, rngs=rngs)  # noqa: E731
    else:
        theirs = TorchUp(24, 16, num_layers=3, add_upsample=more, **shared)
        build = lambda rngs: UpDecoderBlock2D(24, 16, config, upsample=more, rngs=rngs)  # noqa: E731
    theirs, ours = randomised(theirs), Network(build)
    x = scale * rng.standard_normal((2, 6, 9, 24), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x))
    assert relative_error(ours.apply(params_of(theirs, ours), x), nhwc(want)) < BOUND


def test_gradient_through_the_decoder_equals_autograd(rng):
    theirs, ours = pair({**levels(8, 16), "norm_num_groups": 4})
    latents = rng.standard_normal((2, 5, 4, 4), np.float32)
    towards = rng.standard_normal((2, 10, 8, 3), np.float32)
    variable = nchw(latents).requires_grad_()
    (theirs.decode(variable).sample * nchw(towards)).sum().backward()
    params = params_of(theirs, ours)
    got = jax.jit(jax.grad(lambda z: jnp.sum(ours.apply(params, z, method="decode") * towards)))(latents)
    assert relative_error(got, nhwc(variable.grad)) < BOUND


@pytest.mark.parametrize("values", [SD15, ONE_LEVEL, *(values for values, _ in CASES.values())])
def test_names_are_those_of_diffusers(values):
    with torch.device("meta"):
        theirs = TorchVAE.from_config(values)
    config = VAEConfig.from_dict(values)
    ours = Network(lambda rngs: AutoencoderKL(config, rngs)).shapes
    assert sorted(map(torch_name, ours)) == sorted(theirs.state_dict())
    if values is SD15:
        assert count(ours) == 83_653_863
        assert config.downsampling == 8


@pytest.mark.parametrize(("method", "shape"), [("encode", (1, 8, 8, 3)), ("decode", (1, 4, 4, 4))])
def test_bfloat16_parameters_give_a_bfloat16_forward(method, shape, rng):
    theirs, network = pair({**levels(8, 16), "norm_num_groups": 4})
    params = cast(jax.tree.map(jnp.asarray, params_of(theirs, network)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    with torch.no_grad():
        want = getattr(theirs, method)(nchw(x.astype(jnp.float32)))
    want = want.latent_dist.mean if method == "encode" else want.sample

    run = jax.jit(lambda p, x: jax.tree.leaves(network.apply(p, x, method=method)))
    equations = jax.make_jaxpr(run)(params, x).eqns[0].params["jaxpr"].eqns
    convolutions = [e for e in equations if e.primitive.name == "conv_general_dilated"]
    assert convolutions
    assert all(e.outvars[0].aval.dtype == jnp.bfloat16 for e in convolutions)
    got = run(params, x)
    assert all(array.dtype == jnp.bfloat16 for array in got)
    assert relative_error(got[0], nhwc(want)) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_factor": 0.1159}, "shift_factor=0.1159 is not supported"),
        ({"latents_mean": [0.0, 0.1, 0.2, 0.3]}, "latents_mean="),
        ({"latents_std": [1.0] * 4}, "latents_std="),
        ({"scaling_factr": 1.0}, "unknown field scaling_factr"),
        ({"act_fn": "mish"}, "act_fn='mish'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types=.*AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types="),
        ({"norm_num_groups": 48}, "norm_num_groups=48"),
    ],
)
def test_unsupported_configuration_is_an_error_that_names_the_field(change, message):
    with pytest.raises(InputError, match=message):
        VAEConfig.from_dict({**SD21, **change})


@pytest.mark.parametrize(
    "values", [{}, SD15, SD21, SDXL, {**SD15, "sample_size": [64, 32], "force_upcast": False}]
)
def test_configuration_survives_the_round_trip(values):
    with torch.device("meta"):
        original = TorchVAE.from_config(values).config
        config = VAEConfig.from_dict(values)
        written = json.loads(json.dumps(config.to_dict()))
        again = TorchVAE.from_config(written).config
    assert written["_class_name"] == "AutoencoderKL"
    assert VAEConfig.from_dict(written) == config
    public = {name: value for name, value in original.items() if not name.startswith("_")}
    assert json.dumps(public) == json.dumps({name: again[name] for name in public})
