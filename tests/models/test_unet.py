"""The UNet against diffusers: same random weights, same random inputs, block by block and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.models.transformers.transformer_2d import Transformer2DModel as TorchTransformer
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UNetMidBlock2DCrossAttn
from parity import BOUND, nchw, nhwc, params_of, randomised

from sbv2_jax.convert.formats.names import torch_name
from sbv2_jax.errors import InputError
from sbv2_jax.models import published
from sbv2_jax.models.network import Network
from sbv2_jax.models.transformer import Transformer2DModel
from sbv2_jax.models.unet import (
    PLAIN,
    AddedConditions,
    Execution,
    MidBlock,
    UNet2DConditionModel,
    UNetConfig,
    UpBlock,
)
from sbv2_jax.tree import cast, count

pytestmark = pytest.mark.slow

SD15, SD21, SDXL = (published.ARCHITECTURES[name]["unet"] for name in ("sd15", "sd21", "sdxl"))
SMALL = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 16}
CASES = {
    "sd15": {**SD15, **SMALL, "cross_attention_dim": 48},
    "sd21": {**SD21, **SMALL, "cross_attention_dim": 48, "attention_head_dim": [2, 4, 8, 8]},
    "sdxl": {
        **SDXL,
        "block_out_channels": [32, 64, 64],
        "norm_num_groups": 16,
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "ssd-1b": {
        **SDXL,
        "block_out_channels": [32, 64, 64],
        "norm_num_groups": 16,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [3, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 48,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "one layer a block": {**SMALL, "layers_per_block": 1, "cross_attention_dim": 40},
    "layers differ": {**SMALL, "layers_per_block": [1, 2, 3, 1], "cross_attention_dim": 40},
    "uneven heads": {**SMALL, "attention_head_dim": [3, 5, 6, 7], "cross_attention_dim": 40},
    "uneven heads, linear": {
        **SMALL,
        "attention_head_dim": [3, 5, 6, 7],
        "cross_attention_dim": 40,
        "use_linear_projection": True,
    },
    "two levels, odd widths": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [24, 36],
        "norm_num_groups": 6,
        "attention_head_dim": 4,
        "cross_attention_dim": 20,
        "in_channels": 9,
        "out_channels": 8,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "no mid block": {**SMALL, "mid_block_type": None, "cross_attention_dim": 40},
    "mid without attention": {**SMALL, "mid_block_type": "UNetMidBlock2D", "cross_attention_dim": 40},
}


@pytest.mark.parametrize("case", CASES)
def test_whole_network_equals_diffusers(case, rng):
    values = CASES[case]
    torch.manual_seed(0)
    theirs = randomised(TorchUNet.from_config(values))
    config = UNetConfig.from_dict(dict(theirs.config))
    ours = Network(lambda rngs: UNet2DConditionModel(config, rngs))
    params = params_of(theirs, ours)

    latents = rng.standard_normal((2, 16, 24, config.in_channels), np.float32)
    context = rng.standard_normal((2, 7, config.per_level("cross_attention_dim")[0]), np.float32)
    timesteps = np.array([7, 981], np.int32)
    added, added_kwargs = None, None
    if config.addition_embed_type:
        text, ids = rng.standard_normal((2, 24), np.float32), rng.integers(0, 1024, (2, 6)).astype(np.float32)
        added = AddedConditions(text, ids)
        added_kwargs = {"text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(ids)}
    with torch.no_grad():
        want = theirs(
            nchw(latents),
            torch.from_numpy(timesteps),
            torch.from_numpy(context),
            added_cond_kwargs=added_kwargs,
        ).sample
    got = jax.jit(ours.apply)(params, latents, timesteps, context, added)
    assert relative_error(got, nhwc(want)) < BOUND


@pytest.mark.parametrize("linear", [False, True])
def test_transformer_equals_diffusers(linear, rng):
    torch.manual_seed(1)
    theirs = randomised(
        TorchTransformer(
            3, 13, in_channels=40, num_layers=2, cross_attention_dim=24, norm_num_groups=8,
            use_linear_projection=linear,
        )
    )  # fmt: skip
    ours = Network(
        lambda rngs: Transformer2DModel(
            40, 24, heads=3, layers=2, groups=8, linear_projection=linear, rngs=rngs
        )
    )
    params = params_of(theirs, ours)
    x, context = rng.standard_normal((2, 6, 5, 40), np.float32), rng.standard_normal((2, 7, 24), np.float32)
    with torch.no_grad():
        want = theirs(nchw(x), torch.from_numpy(context)).sample
    assert relative_error(ours.apply(params, x, context), nhwc(want)) < BOUND


def test_mid_and_up_block_equal_diffusers(rng):
    config = UNetConfig(
        block_out_channels=(24, 48),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=20,
        layers_per_block=1,
    )
    torch.manual_seed(2)
    mid = randomised(
        UNetMidBlock2DCrossAttn(
            48, 96, resnet_eps=1e-5, resnet_groups=8, num_attention_heads=4, cross_attention_dim=20
        )
    )
    up = randomised(
        CrossAttnUpBlock2D(
            24, 48, 48, 96, num_layers=2, resnet_eps=1e-5, resnet_groups=8, num_attention_heads=4,
            cross_attention_dim=20,
        )
    )  # fmt: skip
    x, emb = rng.standard_normal((2, 4, 6, 48), np.float32), rng.standard_normal((2, 96), np.float32)
    context = rng.standard_normal((2, 7, 20), np.float32)
    skips = [rng.standard_normal((2, 4, 6, width), np.float32) for width in (24, 48)]

    network = Network(lambda rngs: MidBlock(config, PLAIN, rngs))
    with torch.no_grad():
        want = mid(nchw(x), torch.from_numpy(emb), torch.from_numpy(context))
    got = network.apply(params_of(mid, network), x, emb, context)
    assert relative_error(got, nhwc(want)) < BOUND

    network = Network(lambda rngs: UpBlock(config, 1, "CrossAttnUpBlock2D", PLAIN, rngs))
    with torch.no_grad():
        want = up(
            nchw(x), tuple(nchw(skip) for skip in skips), torch.from_numpy(emb), torch.from_numpy(context)
        )
    got, rest = network.apply(params_of(up, network), x, skips, emb, context)
    assert rest == []
    assert relative_error(got, nhwc(want)) < BOUND


@pytest.mark.parametrize(
    ("values", "parameters"), [(SD15, 859_520_964), (SD21, 865_910_724), (SDXL, 2_567_463_684)]
)
def test_published_shapes_have_diffusers_names_and_counts(values, parameters):
    with torch.device("meta"):
        theirs = TorchUNet.from_config(values)
    config = UNetConfig.from_dict(dict(theirs.config))
    ours = Network(lambda rngs: UNet2DConditionModel(config, rngs)).shapes
    assert count(ours) == parameters
    assert {torch_name(name) for name in ours} == set(theirs.state_dict())


def test_remat_changes_no_number(rng):
    config = UNetConfig.from_dict(CASES["two levels, odd widths"])
    plain = Network(lambda rngs: UNet2DConditionModel(config, rngs))
    remat = Network(lambda rngs: UNet2DConditionModel(config, rngs, execution=Execution(remat=True)))
    params = plain.init(0)
    latents = rng.standard_normal((1, 4, 4, 9), np.float32)
    context = rng.standard_normal((1, 7, 20), np.float32)

    def gradient(network):
        return jax.jit(jax.grad(lambda p: jnp.sum(network.apply(p, latents, np.array([500]), context) ** 2)))(
            params
        )

    ours, theirs = gradient(remat), gradient(plain)
    assert max(relative_error(ours[name], theirs[name]) for name in ours if np.any(theirs[name])) < 1e-4


def test_bfloat16_parameters_give_a_bfloat16_forward_with_a_float32_end(rng):
    config = UNetConfig.from_dict(CASES["sd21"])
    network = Network(lambda rngs: UNet2DConditionModel(config, rngs))
    params = cast(network.init(0), jnp.bfloat16)
    latents = jnp.asarray(rng.standard_normal((1, 8, 8, 4)), jnp.bfloat16)
    context = jnp.asarray(rng.standard_normal((1, 7, 48)), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda p: network.apply(p, latents, np.array([5]), context))(params)
    assert jaxpr.out_avals[0].dtype == jnp.float32
    *inner, last = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert inner and last.outvars[0].aval.dtype == jnp.float32
    assert all(e.outvars[0].aval.dtype == jnp.bfloat16 for e in inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_cross_attention": True}, "dual_cross_attention=True is not supported"),
        ({"time_embedding_typo": "x"}, "unknown field time_embedding_typo"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "KDownBlock2D"),
        ({"attention_head_dim": [5, 10]}, "attention_head_dim"),
        ({"act_fn": "mish"}, "act_fn='mish'"),
        ({"addition_embed_type": "text_time"}, "'text_time' needs addition_time_embed_dim and projection_"),
    ],
)
def test_unsupported_configuration_is_an_error_that_names_the_field(change, message):
    with pytest.raises(InputError, match=message):
        UNetConfig.from_dict({**SD21, **change})


def test_configuration_survives_the_round_trip():
    for values in (SD15, SD21, SDXL):
        full = dict(TorchUNet.from_config(CASES["sd15"]).config) | values
        config = UNetConfig.from_dict(full)
        assert UNetConfig.from_dict(config.to_dict()) == config
        written = config.to_dict()
        for name, value in values.items():
            assert written[name] == (tuple(value) if isinstance(value, list) else value)
