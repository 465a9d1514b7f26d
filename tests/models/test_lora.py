"""LoRA: where it is attached, its scale, its merge, and peft's on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
import torch
import torch_reference
from conftest import relative_error
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx
from scipy.stats import ks_2samp

from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.errors import InputError
from sbv2_jax.models import lora
from sbv2_jax.models.layers import Linear
from sbv2_jax.models.network import Network
from sbv2_jax.models.unet import UNet2DConditionModel, UNetConfig
from sbv2_jax.tree import cast

TARGETS = r".*\.attn[12]\.to_(q|v|out\.0)"
RANK, ALPHA = 3, 5.0
SCALE = ALPHA / RANK
# With attention on the way up as well, so that several blocks are matched.
UNET = tiny_world.UNET | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}


class Two(nnx.Module):
    """A dense layer of many inputs, and one that gets no LoRA."""

    def __init__(self, features, rngs):
        self.to_q, self.to_k = Linear(features, 8, rngs=rngs), Linear(features, 8, rngs=rngs)


def unet(targets: str | None = None, rank: int = RANK) -> Network:
    def build(rngs):
        model = UNet2DConditionModel(UNetConfig.from_dict(UNET), rngs)
        return model if targets is None else lora.attach(model, targets, rank, rngs)

    return Network(build)


@pytest.fixture(scope="module")
def plain():
    network = unet()
    return network, jax.jit(network.apply)


@pytest.fixture(scope="module")
def adapted():
    """The network with a LoRA, its compiled call by (parameters, inputs, scale), its base and its LoRA."""
    network = unet(TARGETS)
    base, factors = lora.base_and_factors(tiny_world.random_params(network, 0))
    call = jax.jit(lambda params, inputs, scale: network.apply(params, *inputs, lora_scale=scale))
    return network, call, base, factors


@pytest.fixture
def inputs(rng):
    latents, context = rng.standard_normal((3, 8, 8, 4)), rng.standard_normal((3, 5, 12))
    return jnp.asarray(latents, jnp.float32), jnp.array([3, 500, 999]), jnp.asarray(context, jnp.float32)


def test_exactly_the_matching_dense_layers_get_factors_of_the_rank(plain, adapted):
    network, _, base, factors = adapted
    blocks = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
    layers = [
        f"{block}.transformer_blocks.0.{attention}.{layer}"
        for block in blocks
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_v", "to_out.0")
    ]
    want = {f"{layer}.lora.{part}.kernel" for layer in layers for part in ("down", "up")}
    assert set(factors) == want
    for layer in layers:
        features_in, features_out = base[f"{layer}.kernel"].shape
        assert factors[f"{layer}.lora.down.kernel"].shape == (features_in, RANK)
        assert factors[f"{layer}.lora.up.kernel"].shape == (RANK, features_out)
    # What is left is the plain network's, so teacher and score can share it.
    assert {name: leaf.shape for name, leaf in base.items()} == {
        name: leaf.shape for name, leaf in plain[0].shapes.items()
    }
    assert set(network.shapes) == set(base) | set(factors)


def test_a_fresh_lora_changes_nothing_and_can_learn(adapted):
    _, factors = lora.base_and_factors(adapted[0].init(0))
    for name, factor in factors.items():
        assert np.any(factor) == name.endswith("down.kernel"), name


@pytest.mark.parametrize("features", [8, 320])
def test_a_fresh_lora_starts_as_pefts(features):
    """Both factors of a layer against PEFT's own of many ranks: `up` zero, `down` of one distribution and range."""
    rank = 100_000 // features
    network = Network(lambda rngs: lora.attach(Two(features, rngs), "to_q", rank, rngs))
    torch.manual_seed(5)
    layers = torch.nn.ModuleDict({"to_q": torch.nn.Linear(features, 8)})
    settings = {"rank": rank, "alpha": ALPHA, "targets": "to_q"}
    theirs = torch_reference.weights(torch_reference.with_lora(layers, settings))
    ours = params_to_torch(lora.fresh_factors(network.shapes, 3))
    down, up = (f"to_q.lora.{part}.weight" for part in ("down", "up"))
    assert ours.keys() >= {down, up}
    assert {name: leaf.shape for name, leaf in ours.items()} == {n: theirs[n].shape for n in (down, up)}
    assert not theirs[up].any() and not ours[up].any()
    assert np.abs(theirs[down]).max() <= features**-0.5 and np.abs(ours[down]).max() <= features**-0.5
    # Kolmogorov and Smirnov: 100,000 numbers of one distribution each are apart by 0.0097 once in 10,000 times.
    assert ks_2samp(ours[down].ravel(), theirs[down].ravel()).statistic < 0.0097
    normal = np.random.default_rng(0).normal(0, (3 * features) ** -0.5, theirs[down].size)
    assert ks_2samp(normal, theirs[down].ravel()).statistic > 0.05, "of the same deviation, and told apart"


def test_a_factor_depends_on_its_name_and_the_seed_alone(adapted):
    shapes = adapted[0].shapes
    first, other = lora.fresh_factors(shapes, 3), lora.fresh_factors(shapes, 4)
    names = [name for name in first if ".down." in name]
    alone = lora.fresh_factors({names[2]: shapes[names[2]]}, 3)
    np.testing.assert_array_equal(alone[names[2]], first[names[2]])
    assert all(np.any(first[name] != other[name]) for name in names)
    alike = [first[name] for name in names if first[name].shape == first[names[0]].shape]
    assert len(alike) > 1 and len({leaf.tobytes() for leaf in alike}) == len(alike)


def test_scale_zero_is_the_base_bit_for_bit(plain, adapted, inputs):
    _, call, base, factors = adapted
    # Both compiled alike: as one program in which only the LoRA is missing.
    np.testing.assert_array_equal(call(base | factors, inputs, 0.0), plain[1](base, *inputs))
    assert np.abs(call(base | factors, inputs, SCALE) - plain[1](base, *inputs)).max() > 0.1


def test_scales_of_samples_equal_separate_calls(adapted, inputs):
    _, call, base, factors = adapted
    scales = jnp.array([0.0, SCALE, -0.4])
    together = call(base | factors, inputs, scales)
    for row, scale in enumerate(scales):
        assert relative_error(together[row], call(base | factors, inputs, scale)[row]) < 1e-6
    np.testing.assert_array_equal(together[0], call(base | factors, inputs, 0.0)[0])


def test_merged_weights_give_the_output_of_the_activation_path(plain, adapted, inputs):
    _, call, base, factors = adapted
    merged = lora.merge(base, factors, SCALE)
    assert list(merged) == list(base)
    assert relative_error(plain[1](merged, *inputs), call(base | factors, inputs, SCALE)) < 1e-5
    changed = {name for name in base if np.any(merged[name] != base[name])}
    assert changed == {f"{name.split('.lora.')[0]}.kernel" for name in factors}
    for name in changed:
        module = name.removesuffix(".kernel")
        down, up = (
            np.asarray(factors[f"{module}.lora.{part}.kernel"], np.float64) for part in ("down", "up")
        )
        assert relative_error(merged[name], base[name] + SCALE * down @ up) < 1e-6


def test_merge_into_bfloat16_adds_in_float32_and_rounds_once(adapted):
    """One rounding of the sum; added in bfloat16, the update would be rounded before, and the sum again."""
    _, _, base, factors = adapted
    half_base, half = cast(base, jnp.bfloat16), cast(factors, jnp.bfloat16)
    merged = lora.merge(half_base, half, SCALE)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in merged.values())
    differs = 0
    for name in {name.split(".lora.")[0] for name in factors}:
        kernel, down, up = (
            half_base[f"{name}.kernel"],
            half[f"{name}.lora.down.kernel"],
            half[f"{name}.lora.up.kernel"],
        )
        exact = np.float32(kernel) + np.float32(SCALE) * (np.float32(down) @ np.float32(up))
        got = np.asarray(merged[f"{name}.kernel"], np.float32)
        # A sum that lies between two bfloat16 values may be rounded either way by the last bit of float32.
        assert np.abs(got - exact).max() <= 2**-8 * np.abs(exact).max()
        assert np.mean(got == np.float32(jnp.asarray(exact, jnp.bfloat16))) > 0.99
        differs += np.sum(got != np.float32(kernel + jnp.bfloat16(SCALE) * (down @ up)))
    assert differs > 0, "bfloat16 arithmetic would give something else"


def test_a_lora_of_other_modules_is_refused(adapted):
    _, _, base, factors = adapted
    stray = {
        "mid_block.attentions.0.to_q" + name[name.index(".lora.") :]: leaf for name, leaf in factors.items()
    }
    with pytest.raises(InputError, match=r"base lacks: \['mid_block.attentions.0.to_q'\]"):
        lora.merge(base, factors | stray, SCALE)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (r".*\.to_queries", r"match no dense layer of UNet2DConditionModel"),
        (r"to_q", r"match no dense layer"),  # a full match is meant
        (r".*\.attn1", r"match no dense layer"),  # a module, but none with a kernel
        (r".*(to_q|conv1)", r"match convolutions.*resnets\.0\.conv1"),
    ],
)
def test_targets_that_match_nothing_or_a_convolution_are_refused(targets, message):
    with pytest.raises(InputError, match=message):
        unet(targets)


def test_output_equals_pefts_on_the_same_weights(adapted, inputs):
    _, call, base, factors = adapted
    settings = {"rank": RANK, "alpha": ALPHA, "targets": TARGETS}
    theirs = torch_reference.with_lora(TorchUNet.from_config(UNET), settings).double().eval()
    torch_reference.load(theirs, params_to_torch(base | factors))
    latents, timesteps, context = inputs
    want = theirs(
        torch_reference.nchw(latents),
        torch_reference.integers(timesteps),
        torch.tensor(np.asarray(context, np.float64)),
    ).sample
    got = call(base | factors, inputs, SCALE)
    assert relative_error(got, want.detach().permute(0, 2, 3, 1)) < 1e-5


def test_gradient_reaches_the_factors_and_not_the_base(adapted, inputs):
    """The gradient's program has no convolution or product that makes a gradient of a base kernel's shape."""
    network, _, base, factors = adapted

    def loss(factors):
        return jnp.mean(network.apply(base | factors, *inputs, lora_scale=SCALE) ** 2)

    gradient = jax.make_jaxpr(jax.grad(loss))(factors)
    assert len(gradient.out_avals) == len(factors)
    kernels = {base[f"{name.split('.lora.')[0]}.kernel"].shape for name in factors}
    made = {eqn.outvars[0].aval.shape for eqn in gradient.eqns if eqn.primitive.name == "dot_general"}
    assert not kernels & made
