"""The tiny autoencoder against diffusers: same random weights, same random inputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import AutoencoderTiny as TorchTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock as TorchBlock
from parity import BOUND, nchw, nhwc, params_of, randomised

from sbv2_jax.convert.formats.names import torch_name
from sbv2_jax.errors import InputError
from sbv2_jax.models.network import Network
from sbv2_jax.models.tiny_vae import AutoencoderTiny, AutoencoderTinyBlock, TinyVAEConfig
from sbv2_jax.tree import cast, count

# The published file of TAESD.
TAESD = {
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}
SMALL = {
    "encoder_block_out_channels": [20, 20, 20],
    "decoder_block_out_channels": [12, 12, 12],
    "num_encoder_blocks": [2, 0, 1],
    "num_decoder_blocks": [1, 2, 0],
}
CASES = {
    "taesd": (TAESD, (48, 32)),
    "other widths and block counts": (SMALL, (16, 12)),
    "size that 4 does not divide": (SMALL, (15, 9)),
    "other channels and activation": (
        {**SMALL, "act_fn": "silu", "in_channels": 4, "out_channels": 2, "latent_channels": 6},
        (8, 12),
    ),
}


def pair(values: dict) -> tuple[TorchTiny, Network]:
    torch.manual_seed(0)
    theirs = randomised(TorchTiny.from_config(values))
    config = TinyVAEConfig.from_dict(dict(theirs.config))
    return theirs, Network(lambda rngs: AutoencoderTiny(config, rngs))


@pytest.mark.parametrize("case", CASES)
def test_whole_network_equals_diffusers(case, rng):
    values, size = CASES[case]
    theirs, ours = pair(values)
    params = params_of(theirs, ours)
    images = rng.uniform(-1, 1, (2, *size, theirs.config.in_channels)).astype(np.float32)
    with torch.no_grad():
        encoded = nhwc(theirs.encode(nchw(images)).latents)
    # Wide enough for the decoder's clamp to matter.
    latents = 3 * rng.standard_normal(encoded.shape, np.float32)
    with torch.no_grad():
        decoded = nhwc(theirs.decode(nchw(latents)).sample)
    found = {
        "encoded": relative_error(
            jax.jit(lambda p, x: ours.apply(p, x, method="encode"))(params, images), encoded
        ),
        "decoded": relative_error(
            jax.jit(lambda p, x: ours.apply(p, x, method="decode"))(params, latents), decoded
        ),
    }
    print(case, found)
    assert max(found.values()) < BOUND


def test_block_equals_diffusers(rng):
    torch.manual_seed(1)
    theirs = randomised(TorchBlock(20, 20, "gelu"))
    ours = Network(lambda rngs: AutoencoderTinyBlock(20, "gelu", rngs))
    x = rng.standard_normal((2, 6, 5, 20), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x))
    assert relative_error(ours.apply(params_of(theirs, ours), x), nhwc(want)) < BOUND


def test_gradient_through_the_decoder_equals_autograd(rng):
    theirs, ours = pair(TAESD)
    latents = rng.standard_normal((2, 4, 3, 4), np.float32)
    towards = rng.standard_normal((2, 32, 24, 3), np.float32)
    variable = nchw(latents).requires_grad_()
    (theirs.decode(variable).sample * nchw(towards)).sum().backward()
    params = params_of(theirs, ours)
    got = jax.jit(jax.grad(lambda z: jnp.sum(ours.apply(params, z, method="decode") * towards)))(latents)
    assert relative_error(got, nhwc(variable.grad)) < BOUND


@pytest.mark.parametrize("values", [TAESD, SMALL])
def test_names_are_those_of_diffusers(values):
    with torch.device("meta"):
        theirs = TorchTiny.from_config(values)
    config = TinyVAEConfig.from_dict(values)
    ours = Network(lambda rngs: AutoencoderTiny(config, rngs)).shapes
    assert sorted(map(torch_name, ours)) == sorted(theirs.state_dict())
    if values is TAESD:
        assert count(ours) == 2_445_063
        assert config.downsampling == 8


@pytest.mark.parametrize(("method", "shape"), [("encode", (1, 16, 16, 3)), ("decode", (1, 4, 4, 4))])
def test_bfloat16_parameters_give_a_bfloat16_forward(method, shape, rng):
    theirs, network = pair(SMALL)
    params = cast(jax.tree.map(jnp.asarray, params_of(theirs, network)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    with torch.no_grad():
        (want,) = getattr(theirs, method)(nchw(x.astype(jnp.float32)), return_dict=False)
    got = jax.jit(lambda p, x: network.apply(p, x, method=method))(params, x)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, nhwc(want)) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear' is not supported"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor=3"),
        ({"shift_factor": 0.5}, "shift_factor=0.5"),
        ({"latent_magnitud": 3}, "unknown field latent_magnitud"),
        ({"act_fn": "mish"}, "act_fn='mish'"),
        ({"num_encoder_blocks": [1, 3]}, "num_encoder_blocks="),
        ({"decoder_block_out_channels": [64, 32, 32, 32]}, "decoder_block_out_channels="),
    ],
)
def test_unsupported_configuration_is_an_error_that_names_the_field(change, message):
    with pytest.raises(InputError, match=message):
        TinyVAEConfig.from_dict({**TAESD, **change})


@pytest.mark.parametrize("values", [{}, TAESD, {**SMALL, "latent_magnitude": 2.5, "scaling_factor": 0.5}])
def test_configuration_survives_the_round_trip(values):
    with torch.device("meta"):
        original = TorchTiny.from_config(values).config
        # What diffusers would write, its derived `block_out_channels` included.
        config = TinyVAEConfig.from_dict(dict(original))
        written = json.loads(json.dumps(config.to_dict()))
        again = TorchTiny.from_config(written).config
    assert config == TinyVAEConfig.from_dict(values) == TinyVAEConfig.from_dict(written)
    assert written["_class_name"] == "AutoencoderTiny"
    public = {name: value for name, value in original.items() if not name.startswith("_")}
    assert json.dumps(public) == json.dumps({name: again[name] for name in public})
