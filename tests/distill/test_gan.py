"""The GAN loss in latent space: the head, the gradients to samples and head against autograd's, and a whole step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
import torch
import torch.nn.functional as F
from conftest import relative_error
from parity import params_of, randomised
from step_reference import make_reference, torch_ids
from torch_reference import integers, nchw

from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.devices.programs import Separate
from sbv2_jax.distill.gradients import encode, follower_gradient, pull, random_numbers
from sbv2_jax.distill.terms.gan import discriminator_loss, generator_loss
from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.models.discriminator import DiscriminatorHead
from sbv2_jax.models.network import Network
from sbv2_jax.run.batches import abstract_batch

pytestmark = pytest.mark.slow

BOUND = 1e-4
ALONE = {"terms": ("gan",), "gan.path": "drawn at random", "gan.share": 0.5, "gan.weight": 0.7}
REAL = np.array([1, 3])  # of four rows
# Of the steps, which are compiled in three ways.
UNET = tiny_world.UNET | tiny_world.ONE_LEVEL | {"block_out_channels": [16]}


class TorchHead(torch.nn.Module):
    """DMD2's classification branch, for features of any side."""

    def __init__(self, channels: int, side: int, groups: int):
        super().__init__()
        self.convs, self.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
        while side > 4:
            self.convs.append(torch.nn.Conv2d(channels, channels, kernel_size=4, stride=2, padding=1))
            side //= 2
        self.convs.append(torch.nn.Conv2d(channels, channels, kernel_size=side, stride=side, padding=0))
        self.norms.extend(torch.nn.GroupNorm(groups, channels) for _ in self.convs)
        self.conv_out = torch.nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = F.silu(norm(conv(features)))
        return self.conv_out(features).squeeze(dim=[1, 2, 3])


@pytest.mark.parametrize("side", [2, 8, 12, 16])
def test_the_head_equals_dmd2_s(rng, side):
    torch.manual_seed(side)
    theirs = randomised(TorchHead(8, side, 4))
    ours = Network(lambda rngs: DiscriminatorHead(8, side, 4, rngs))
    features = rng.standard_normal((3, side, side, 8), np.float32)
    with torch.no_grad():
        want = theirs(nchw(features).float())
    assert relative_error(ours.apply(params_of(theirs, ours), jnp.asarray(features)), want) < 1e-5


def test_the_losses_are_those_of_the_published_code(rng):
    real, fake = (3 * rng.standard_normal(50, np.float32) for _ in range(2))
    theirs = F.softplus(torch.tensor(fake)) + F.softplus(-torch.tensor(real))
    assert relative_error(discriminator_loss(jnp.asarray(real), jnp.asarray(fake)), theirs) < 1e-6
    want = -torch.log(torch.sigmoid(torch.tensor(fake)))
    assert relative_error(generator_loss(jnp.asarray(fake)), want) < 1e-6


@pytest.fixture(scope="module")
def world():
    return tiny_world.make_world(ALONE)


class Torch:
    """The teacher and the head in PyTorch, in float64, and the prompts as they take them."""

    def __init__(self, world):
        self.reference = make_reference(world, {})
        player = world.run.method.players["discriminator"]
        channels, side = tiny_world.UNET["block_out_channels"][-1], tiny_world.LATENTS[0] // 2
        self.head = TorchHead(channels, side, tiny_world.UNET["norm_num_groups"]).double()
        named = params_to_torch(world.discriminator)
        assert player.network.shapes.keys() == world.discriminator.keys()
        self.head.load_state_dict({name: torch.tensor(np.asarray(leaf)) for name, leaf in named.items()})
        self.text = self.reference.encode(torch_ids(world)[0])

    def logits(self, x: torch.Tensor, noising) -> torch.Tensor:
        reference, kept = self.reference, []
        t = integers(noising.t)
        hook = reference.teacher.mid_block.register_forward_hook(lambda *args: kept.append(args[2]))
        x_t = reference.process.noised(x, nchw(noising.noise), t)
        reference.teacher(x_t, t, *self.text)
        hook.remove()
        return self.head(kept[0])


def drawn(world):
    """The random numbers of the term, and of the discriminator, in the first step."""
    student, followers = random_numbers(world.run.method, world.init().key, 0, tiny_world.BATCH)
    return student.terms["gan"], followers["discriminator"]


def test_the_gradient_to_the_samples_equals_autograd(world, rng):
    x = rng.standard_normal((tiny_world.BATCH, *tiny_world.LATENTS), np.float32)
    (noising, _), method = drawn(world), world.run.method

    @jax.jit
    def ours(params, frozen, batch, x):
        conditions = encode(method, frozen, batch)
        return pull(method, jnp.int32(0), params, frozen, x, conditions, {"gan": noising}, {})

    dx, metrics = ours({"discriminator": world.discriminator}, world.frozen, world.batch, x)
    theirs = nchw(x).requires_grad_()
    logits = Torch(world).logits(theirs, noising)[REAL]
    assert np.flatnonzero(world.batch["real"]).tolist() == REAL.tolist() and logits.std() > 0.05
    loss = F.softplus(-logits).mean()
    (0.7 * loss).backward()
    assert relative_error(dx, theirs.grad.permute(0, 2, 3, 1)) < BOUND
    assert float(metrics["loss/gan"]) == pytest.approx(loss.item(), rel=BOUND)
    assert float(metrics["gan/realism"]) == pytest.approx(torch.sigmoid(logits).mean().item(), rel=BOUND)


def test_the_gradient_to_the_head_equals_autograd(world, rng):
    """Samples and real latents of the same prompts, each with its own noise and timestep; other rows say nothing."""
    x = rng.standard_normal((tiny_world.BATCH, *tiny_world.LATENTS), np.float32)
    (_, noise), method = drawn(world), world.run.method
    assert not np.array_equal(noise[0].t, noise[1].t)

    @jax.jit
    def ours(params, frozen, batch, x):
        player, text = method.players["discriminator"], encode(method, frozen, batch).text
        return follower_gradient(player, params, frozen, x, text, player.read(batch, noise))

    grads, metrics = ours(world.discriminator, world.frozen, world.batch, x)
    theirs = Torch(world)
    latents = world.batch["real_latents"]
    real, fake = (
        theirs.logits(nchw(array), one)[REAL] for array, one in zip((latents, x), noise, strict=True)
    )
    loss = F.softplus(fake).mean() + F.softplus(-real).mean()
    loss.backward()
    assert float(metrics["loss/discriminator"]) == pytest.approx(loss.item(), rel=BOUND)
    got = params_to_torch(grads)
    want = {name: parameter.grad for name, parameter in theirs.head.named_parameters()}
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert relative_error(got[name], grad) < BOUND, name


def test_a_step_trains_student_and_head_in_any_passes_and_stages():
    """The score model is not needed; the mean over the rows is that of the passes, whichever pass they are in."""
    world = tiny_world.make_world(ALONE, unet=UNET)
    method, run = world.run.method, world.run
    assert list(run.state_shapes.players) == ["student", "discriminator"]
    assert run.frozen_parts.keys() == {"teacher"}
    state = world.init()
    results = []
    for passes in (1, 2):
        step = make_train_step(dataclasses.replace(method, accumulate=passes))
        results.append(jax.jit(step)(state, world.frozen, world.batch))
    (one, metrics), (two, again) = results
    assert metrics.keys() == {
        "loss/gan", "gan/realism", "loss/discriminator", "grad_norm/student", "grad_norm/discriminator",
        "latents/std", "skipped",
    } and metrics["skipped"] == 0  # fmt: skip
    for name in metrics.keys() - {"skipped"}:
        assert float(again[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    for player, before in (("student", world.student), ("discriminator", world.discriminator)):
        after = one.players[player].params
        assert min(np.abs(after[name] - leaf).max() for name, leaf in before.items()) > 0, player

    programs = Separate()
    step = make_train_step(method, programs=programs)
    shapes = jax.tree.map(functools.partial(jax.eval_shape, jnp.asarray), (state, world.frozen))
    step(*shapes, abstract_batch(tiny_world.BATCH, run))
    _, staged = step(state, world.frozen, jax.tree.map(jnp.asarray, world.batch))
    for name in metrics.keys() - {"skipped"}:
        assert float(staged[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
