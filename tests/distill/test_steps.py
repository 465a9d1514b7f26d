"""Whole training steps against PyTorch: gradients, losses, both AdamW updates, clip, EMA; one step and three.

Each case is one run as `assemble` makes it, its `train_step` compiled once, and one `torch_reference.Reference`
with the same weights and random numbers. Between them the cases have full and LoRA students, epsilon and v of
student and of teacher, all weightings, all guidance scales, both decoders, several score updates, accumulation,
students of few steps, and SDXL with both of its null conditions.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
import tiny_world
import torch
import torch_reference
from conftest import measured
from step_reference import make_reference, torch_ids, torch_start
from tiny_world import World
from torch_reference import integers, nchw
from toy_world import changed

from sbv2_jax.convert.formats.names import params_to_torch
from sbv2_jax.distill.gradients import FRESH, fresh_inputs, random_numbers
from sbv2_jax.distill.random_numbers import keys_of_updates
from sbv2_jax.distill.train_step import make_train_step

pytestmark = pytest.mark.slow

GRADIENT_BOUND = 1e-4
WEIGHT_BOUND = 1e-5
UPDATE_BOUND = 1e-4
STEPS = 3

OPTIMIZER = {
    "student.lr": 3e-3,
    "score.lr": 1e-2,
    # Adam's first step is g / (|g| + eps). With its usual eps that is the sign of g, and where g is near 0
    # rounding decides it; with an eps of the size of the clipped gradients every weight can be compared.
    "optimizer.eps": 1e-4,
    "optimizer.weight_decay": 0.03,
    "optimizer.clip_norm": 0.01,
}
# Changes of the configuration, what the networks predict, and what else the world is made of. The weight of the
# CLIP loss makes its gradient about as large as the other's.
CASES = {
    "full, epsilon, sbv2, KL decoder": ({"clip.weight": 4.0, "clip.decoder": "vae"}, {}, {}),
    "full, v, dmd, tiny decoder, three score updates": (
        {
            "vsd.weighting": "dmd",
            "vsd.score_guidance": 1.0,
            "clip.weight": 3.0,
            "score.updates_per_step": 3,
        },
        {"student_prediction": "v_prediction", "teacher_prediction": "v_prediction"},
        {},
    ),
    "LoRA, v from epsilon, dmd, no guidance, tiny decoder, two passes": (
        {
            "student.mode": "lora",
            "vsd.weighting": "dmd",
            "vsd.guidance": 1.0,
            "vsd.score_guidance": 1.0,
            "vsd.weight": 0.7,
            "score.weighting": "v",
            "clip.weight": 3.0,
            "accumulate": 2,
        },
        {"student_prediction": "v_prediction"},
        {},
    ),
    "LoRA, epsilon from v, sbv2, KL decoder": (
        {"student.mode": "lora", "score.weighting": "native", "clip.weight": 1.0, "clip.decoder": "vae"},
        {"teacher_prediction": "v_prediction"},
        {},
    ),
    "four steps, full, epsilon, two score updates": (
        {
            "seed": 5,
            "student.timesteps": (999, 749, 499, 249),
            "optimizer.clip_norm": 1e-3,  # of later steps the gradients are smaller, by a_t
            "clip.weight": 3.0,
            "score.updates_per_step": 2,
        },
        {},
        {},
    ),
    "two steps, LoRA, v, dmd, two passes": (
        {
            "seed": 5,
            "student.timesteps": (999, 499),
            "student.mode": "lora",
            "vsd.weighting": "dmd",
            "clip.weight": 3.0,
            "accumulate": 2,
        },
        {"student_prediction": "v_prediction", "teacher_prediction": "v_prediction"},
        {},
    ),
    "SDXL, full, v, zero null, two passes": (
        {"clip.weight": 0.4, "clip.decoder": "vae", "accumulate": 2},
        {"student_prediction": "v_prediction", "teacher_prediction": "v_prediction"},
        {"xl": True, "zero_null": True},
    ),
    "SDXL, LoRA, epsilon, encoded null, two score updates, two passes": (
        {"student.mode": "lora", "clip.weight": 2.0, "score.updates_per_step": 2, "accumulate": 2},
        {},
        {"xl": True, "zero_null": False},
    ),
}


@dataclasses.dataclass
class Both:
    """The results of each side after every step, under PyTorch's plain names and axes, and what made them."""

    world: World
    step: object
    reference: torch_reference.Reference
    states: list
    ours: list[dict]
    theirs: list[dict]
    cosines: torch.Tensor
    clip_over_vsd: float
    taken: list[int]


def drawer(world: World) -> Callable:
    """Returns a function of key and step: our random numbers for PyTorch.

    They are the start, noise and t of the student, noise, t and the mask of null prompts of the score model, and for
    each of its updates on fresh samples the prompts, a start, and the three again.
    """
    method, batch, frozen = world.run.method, world.config.batch_size, world.frozen
    prompts = world.batch.get(FRESH, np.zeros((0, *world.batch["input_ids"].shape), np.int32))

    @jax.jit
    def draw(key, step):
        keys = keys_of_updates(key, step, len(prompts))
        inputs = [
            fresh_inputs(method, method.players["score"], of_update, frozen, ids)
            for of_update, ids in zip(keys, prompts, strict=True)
        ]
        return random_numbers(method, key, step, batch), [(z, noise) for z, _, noise in inputs]

    def of_the_score(noise):
        return nchw(noise.noise), integers(noise.t), integers(noise.null).bool()

    def draws(key: jax.Array, step: int):
        (student, followers), fresh = draw(key, step)
        vsd = student.terms["vsd"]
        updates = [
            (integers(ids), torch_start(z), of_the_score(noise))
            for ids, (z, noise) in zip(prompts, fresh, strict=True)
        ]
        return (
            (torch_start(student.z), nchw(vsd.noise), integers(vsd.t)),
            of_the_score(followers["score"]),
            updates,
        )

    return draws


def recorded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer with a first part whose state holds the last gradients as they came."""
    return optax.chain(optax.trace(decay=0.0), optimizer)


def as_torch(state) -> dict[str, dict[str, np.ndarray]]:
    trees = {"ema": state.ema}
    for name, player in state.players.items():
        trees |= {name: player.params, f"{name} gradient": player.opt[0].trace}
    return {name: params_to_torch(tree) for name, tree in trees.items()}


@pytest.fixture(scope="module", params=CASES)
def both(request) -> Both:
    changes, predictions, kind = CASES[request.param]
    world = tiny_world.make_world(OPTIMIZER | changes, **predictions, **kind)
    reference = make_reference(world, predictions)
    optimizers = world.run.method.optimizers
    method = changed(
        world.run.method, **{f"{name}__optimizer": recorded(one) for name, one in optimizers.items()}
    )
    state = world.init(method)
    ids, draws = torch_ids(world), drawer(world)
    tau, cosines, clip_over_vsd = balance(reference, ids, draws(state.key, 0)[0])
    reference.method.tau = tau
    step = jax.jit(make_train_step(changed(method, clip__tau=tau)))
    states, ours, theirs, taken = [state], [as_torch(state)], [], []
    for index in range(STEPS):
        state, metrics = step(state, world.frozen, world.batch)
        states.append(state)
        ours.append(as_torch(state) | {"metrics": jax.tree.map(float, metrics)})
        drawn = draws(state.key, index)
        taken.append(drawn[0][0][2])
        metrics = reference.step(index, *ids, *drawn)
        theirs.append(
            {
                "student": torch_reference.weights(reference.student),
                "ema": torch_reference.weights(reference.average),
                "score": torch_reference.weights(reference.score),
                "student gradient": reference.gradients[reference.student],
                "score gradient": reference.gradients[reference.score],
                "metrics": metrics,
            }
        )
    return Both(
        world=world,
        step=step,
        reference=reference,
        states=states,
        ours=ours,
        theirs=theirs,
        cosines=cosines,
        clip_over_vsd=clip_over_vsd,
        taken=taken,
    )


def balance(reference, ids, draws) -> tuple[float, torch.Tensor, float]:
    """Returns a tau between the first step's cosines, these, and the ratio of both losses' gradients then."""
    start, noise, t = draws
    with torch.no_grad():
        text, null = reference.encode(ids[0]), reference.encode_null(ids[2])
        x = reference.generate(start, text)
    x.requires_grad_()
    method, cosines = reference.method, reference.cosines(x, ids[1])
    tau = cosines.sort().values[1:3].mean().item()
    (clip,) = torch.autograd.grad(method.clip_weight * torch.clamp(tau - cosines, min=0).mean(), x)
    vsd = method.vsd_weight * reference.vsd_direction(x.detach(), noise, t, text, null) / x.numel()
    return tau, cosines.detach(), (clip.norm() / vsd.norm()).item()


def norm(tree: dict[str, np.ndarray]) -> float:
    return sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in tree.values()) ** 0.5


def minus(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    assert a.keys() == b.keys()
    return {name: np.float64(a[name]) - b[name] for name in b}


@pytest.mark.parametrize("network", ["student", "score"])
def test_gradients_of_every_leaf_equal_autograd(both, network):
    """The L2 norm of the error over that of the gradient: for all leaves together, and for each of its own.

    No leaf's gradient is so near zero that a floor would be needed.
    """
    ours, theirs = (side[f"{network} gradient"] for side in (both.ours[1], both.theirs[0]))
    error = minus(ours, theirs)
    worst = max(norm({n: error[n]}) / norm({n: theirs[n]}) for n in theirs)
    assert norm(error) / norm(theirs) < GRADIENT_BOUND
    assert measured(worst) < GRADIENT_BOUND


@pytest.mark.parametrize("count", [1, STEPS])
def test_weights_after_whole_steps_equal_pytorch(both, count):
    """Every weight to 1e-5 of its tensor's largest; what the steps changed, to 1e-4 of that change."""
    for name in ("student", "ema", "score"):
        ours, theirs, start = both.ours[count][name], both.theirs[count - 1][name], both.ours[0][name]
        error, change = minus(ours, theirs), minus(theirs, start)
        worst = max(np.abs(error[n]).max() / np.abs(theirs[n]).max() for n in theirs)
        assert measured(worst) < WEIGHT_BOUND
        assert norm(error) / norm(change) < UPDATE_BOUND
        assert min(norm({n: change[n]}) for n in change) > 0, "every tensor is trained"


def test_losses_equal_pytorch(both):
    for ours, theirs in zip(both.ours[1:], both.theirs, strict=True):
        for name, value in theirs["metrics"].items():
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert ours["metrics"]["skipped"] == 0.0
    first = both.ours[1]
    for name in ("student", "score"):
        if name == "score" and both.world.run.method.players["score"].updates > 1:
            continue  # the metric is the mean over the updates, the gradient that of the last
        assert first["metrics"][f"grad_norm/{name}"] == pytest.approx(
            norm(first[f"{name} gradient"]), rel=1e-5
        )


def test_of_the_case_itself_both_losses_pull_and_half_of_the_samples_are_clamped(both):
    """Half above tau, half below: a clamp of the batch's mean would give another loss."""
    assert (both.cosines > both.reference.method.tau).sum() == 2
    assert 0.1 < both.clip_over_vsd < 10
    few = len(both.world.run.method.student.timesteps)
    assert max(both.taken) == few - 1, "the last of the student's steps is among those that are trained"
    assert len({*both.taken}) == min(few, STEPS)


def test_a_second_run_is_bit_identical(both):
    state = both.states[0]
    for _ in range(STEPS):
        state, _ = both.step(state, both.world.frozen, both.world.batch)
    jax.tree.map(np.testing.assert_array_equal, state, both.states[-1])


def test_what_is_not_finite_changes_nothing_but_the_step(both):
    """A teacher that gives NaN on one of the prompts only, as an overflow would."""
    frozen = both.world.frozen
    suffix = "text_model.embeddings.token_embedding.embedding"
    embedding = next(name for name in frozen["text_encoder"] if name.endswith(suffix))
    token = both.world.batch["input_ids"][1].flat[0]
    text = frozen["text_encoder"]
    poisoned = text | {embedding: text[embedding].at[token].set(np.nan)}
    before = both.states[1]
    after, metrics = both.step(before, frozen | {"text_encoder": poisoned}, both.world.batch)
    assert metrics["skipped"] == 1.0
    assert after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, step=before.step), before)
