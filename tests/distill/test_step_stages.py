"""The stages of a step on their own: the VSD direction in all its variants, and the pull of the CLIP loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
import torch
from conftest import relative_error
from step_reference import make_reference, torch_ids
from torch_reference import integers, nchw
from toy_world import changed

from sbv2_jax.distill.gradients import encode, follower_gradient, pull, random_numbers
from sbv2_jax.distill.score import ScoreNoise
from sbv2_jax.distill.terms.term import Given

pytestmark = pytest.mark.slow

BOUND = 1e-4
GUIDANCES = [(4.5, 4.5), (4.5, 1.0), (1.0, 1.0)]


@dataclasses.dataclass
class Compiled:
    """Stands for a network of which only the forward pass is needed: it is compiled once for each batch size."""

    apply: object


@pytest.fixture(scope="module")
def direction_inputs():
    """The world of each prediction type with a compiled score network, the samples x, and the draws."""
    worlds = {}
    for prediction in ("epsilon", "v_prediction"):
        world = tiny_world.make_world(teacher_prediction=prediction)
        worlds[prediction] = world
    score = Compiled(jax.jit(worlds["epsilon"].run.method.players["score"].network.apply))
    world = worlds["epsilon"]
    key = world.init().key
    student, _ = random_numbers(world.run.method, key, 0, tiny_world.BATCH)
    encoded = jax.jit(functools.partial(encode, world.run.method))(world.frozen, world.batch)
    return worlds, score, student, encoded.text


def difference(method, world, x, noise, text):
    """The VSD gradient at x, as the term of this method prepares it."""
    (vsd,) = method.terms
    return vsd.prepare(Given(0, {"score": world.score}, world.frozen, text, noise.terms["vsd"]), x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", ["sbv2", "dmd"])
@pytest.mark.parametrize(("guidance", "score_guidance"), GUIDANCES)
def test_vsd_direction_equals_pytorch(direction_inputs, rng, prediction, weighting, guidance, score_guidance):
    worlds, score, noise, text = direction_inputs
    world = worlds[prediction]
    x = rng.standard_normal((tiny_world.BATCH, *tiny_world.LATENTS), np.float32)
    changes = {"weighting": weighting, "guidance": guidance, "score_guidance": score_guidance}
    changes = {f"vsd__{name}": value for name, value in changes.items()}
    ours = difference(changed(world.run.method, score__network=score, **changes), world, x, noise, text)
    assert ours.dtype == jnp.float32

    reference = make_reference(world, {"teacher_prediction": prediction})
    method = reference.method
    method.weighting, method.guidance, method.score_guidance = weighting, guidance, score_guidance
    ids = torch_ids(world)
    vsd_noise = nchw(noise.terms["vsd"].noise), integers(noise.terms["vsd"].t)
    with torch.no_grad():
        rows, null = reference.encode(ids[0]), reference.encode_null(ids[-1])
        theirs = reference.vsd_direction(nchw(x), *vsd_noise, rows, null)
    for row, want in zip(ours, theirs.permute(0, 2, 3, 1), strict=True):  # each sample has its own weight
        assert relative_error(row, want) < BOUND


@pytest.mark.parametrize(
    ("guidance", "score_guidance", "passes"), [(4.5, 4.5, 4), (4.5, 0.0, 3), (0.5, 4.5, 3), (1.0, 1.0, 2)]
)
def test_a_guidance_of_one_costs_no_unconditional_forward(direction_inputs, guidance, score_guidance, passes):
    """Counted where the UNet begins: the rows that its first convolution is given."""
    worlds, _, noise, text = direction_inputs
    world = worlds["epsilon"]
    method = changed(world.run.method, vsd__guidance=guidance, vsd__score_guidance=score_guidance)
    program = jax.make_jaxpr(lambda x: difference(method, world, x, noise, text))(noise.z)
    first = (3, 3, tiny_world.LATENTS[-1], tiny_world.UNET["block_out_channels"][0])
    rows = [
        eqn.invars[0].aval.shape[0]
        for eqn in program.eqns
        if eqn.primitive.name == "conv_general_dilated" and eqn.invars[1].aval.shape == first
    ]
    assert rows == [passes * tiny_world.BATCH], "one forward for teacher and score, conditional and not"


@pytest.mark.parametrize(("decoder", "size"), [("vae_tiny", 1.0), ("vae", 0.3)])
def test_clip_gradient_through_the_decoder_equals_autograd(decoder, size, rng):
    """The CLIP loss alone: with a direction of zero the VSD loss pulls nowhere. `size` is that of the latents."""
    world = tiny_world.make_world({"clip.weight": 0.2, "clip.decoder": decoder})
    x = np.float32(size) * rng.standard_normal((tiny_world.BATCH, *tiny_world.LATENTS), np.float32)
    reference = make_reference(world, {})
    ids = torch_ids(world)
    theirs = nchw(x).requires_grad_()
    cosines = reference.cosines(theirs, ids[1])
    tau = cosines.sort().values[1:3].mean().item()
    torch.relu(tau - cosines).mean().mul(0.2).backward()

    method = changed(world.run.method, clip__tau=tau)

    def stage(frozen, batch, x):
        conditions, prepared = encode(method, frozen, batch), {"vsd": jnp.zeros_like(x)}
        return pull(method, jnp.int32(0), {}, frozen, x, conditions, {}, prepared)

    gradient, metrics = jax.jit(stage)(world.frozen, world.batch, x)
    assert relative_error(gradient, theirs.grad.permute(0, 2, 3, 1)) < BOUND
    assert metrics["loss/clip"] == pytest.approx(torch.relu(tau - cosines).mean().item(), rel=1e-4)
    assert metrics["clip/cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    moved = np.any(np.asarray(gradient) != 0, axis=(1, 2, 3))
    np.testing.assert_array_equal(moved, (cosines < tau).numpy(), "only samples below tau are pulled")
    with torch.no_grad():
        pictures = reference.vae.decode(nchw(x) / reference.vae.config.scaling_factor).sample
    assert (pictures.abs() < 1).double().mean() > 0.3, "most pixels clipped: little gradient was compared"


def test_null_prompts_are_those_of_their_own_samples():
    """To drop the prompts of some samples is to give those samples, and no others, the empty prompt."""
    world = tiny_world.make_world()
    method, frozen = world.run.method, world.frozen
    draws = random_numbers(method, world.init().key, 0, tiny_world.BATCH)[1]["score"]
    x = jax.random.normal(jax.random.key(1), (tiny_world.BATCH, *tiny_world.LATENTS))

    def stage(batch, noise):
        text = encode(method, frozen, batch).text
        return follower_gradient(method.players["score"], world.score, frozen, x, text, noise)

    def gradient(batch, null):
        noise = ScoreNoise(draws.noise, draws.t, jnp.array(null))
        grads, metrics = compiled(batch, noise)
        return grads | {"loss": metrics["loss/score"]}

    compiled = jax.jit(stage)
    ids = world.batch["input_ids"]
    dropped = [True, False, False, True]
    got = gradient(world.batch, dropped)
    empty = np.where(np.array(dropped)[:, None], tiny_world.EMPTY, ids)
    same = gradient({"input_ids": empty}, [False] * 4)
    for name, leaf in got.items():
        assert relative_error(leaf, same[name]) < 1e-5, name
    other = gradient(world.batch, [True] * 4)
    assert abs(other["loss"] - got["loss"]) > 1e-3 * got["loss"]


def test_a_range_of_guidance_is_drawn_for_each_sample_and_taken_as_it_is(direction_inputs, rng):
    """Against PyTorch row by row, each with the guidance that was drawn for it; below 1 too."""
    worlds, score, noise, text = direction_inputs
    world = worlds["epsilon"]
    x = rng.standard_normal((tiny_world.BATCH, *tiny_world.LATENTS), np.float32)
    method = changed(world.run.method, score__network=score, vsd__guidance=(0.5, 4.0))
    drawn, _ = random_numbers(method, world.init().key, 0, tiny_world.BATCH)
    guidances = drawn.terms["vsd"].guidance
    assert len(set(guidances.tolist())) == tiny_world.BATCH
    np.testing.assert_array_equal(drawn.terms["vsd"].noise, noise.terms["vsd"].noise, "no other draw moves")
    many = random_numbers(method, world.init().key, 0, 4000)[0].terms["vsd"].guidance
    assert 0.5 <= many.min() < 0.52 and 3.98 < many.max() < 4.0 and abs(many.mean() - 2.25) < 0.06
    ours = difference(method, world, x, drawn, text)

    reference = make_reference(world, {"teacher_prediction": "epsilon"})
    ids = torch_ids(world)
    vsd_noise = nchw(drawn.terms["vsd"].noise), integers(drawn.terms["vsd"].t)
    for row, guidance in enumerate(guidances.tolist()):
        reference.method.guidance = guidance
        with torch.no_grad():
            rows, null = reference.encode(ids[0]), reference.encode_null(ids[-1])
            theirs = reference.vsd_direction(nchw(x), *vsd_noise, rows, null)
        assert relative_error(ours[row], theirs.permute(0, 2, 3, 1)[row]) < BOUND
