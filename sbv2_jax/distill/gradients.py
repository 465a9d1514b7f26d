"""The stages of a training step: pure functions with only latents between them.

fresh samples      prompts, key            -> samples, and what a follower's update on them needs
random_numbers     step, key               -> the random numbers of the student's update and of the one after it
encode             prompts                 -> text conditions, and what each term makes of its columns
student steps      student, z              -> where a student of several steps is before the one that is trained
student forward    student, z or that      -> x, the student's sample
TERM prepare       players, x              -> what a term prepares without gradient, such as the VSD direction
pull               x                       -> d loss / d x, in latent space, of all terms
student backward   d loss / d x            -> the gradient to the student's parameters
FOLLOWER forward, backward   x             -> the gradient to a player that follows the student
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sbv2_jax.devices.programs import ANYWHERE, INLINE, Placement, Programs
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.player import Player
from sbv2_jax.distill.random_numbers import keys_of_step, keys_of_update
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.distill.student import Start
from sbv2_jax.distill.terms.term import Given, Prepare, Term
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params

Metrics = dict[str, jax.Array]

# Token ids by the name of their column: "input_ids" for the text encoder, [B, S] or SDXL's [B, 2, S], those that
# the terms read, and where a step has more than one update of a follower, FRESH, [updates - 1, B, ...]. Beside them
# the columns of rows that are a term's own, such as "pair_latents", [B, h, w, C].
Batch = dict[str, jax.Array]
FRESH = "fresh_input_ids"


class Conditions(NamedTuple):
    """The prompts as the networks take them, and what each term encoded, by its name; [B, ...] all."""

    text: Text
    encoded: dict[str, Any]


class StudentNoise(NamedTuple):
    """The random numbers of the student's update: z [B, h, w, C], and each term's by its name, [B, ...].

    Of a student of several steps z is a `Start`, which holds what its steps take besides.
    """

    z: jax.Array | Start
    terms: dict[str, Any]


def random_numbers(
    method: Method, key: jax.Array, step: jax.Array, batch_size: int
) -> tuple[StudentNoise, dict[str, Any]]:
    """Draws the whole batch's random numbers at once: the student's, and each follower's by its name.

    They depend on the root key and the step alone: not on the mesh, nor on how the batch is accumulated. The
    followers' are those of the update on the student's own samples.
    """

    keys_of = keys_of_step(key, step)

    def drawn(owner: Player | Term) -> Any:
        return owner.draw(keys_of(owner.name), batch_size, method.latent_shape)

    student = StudentNoise(drawn(method.student), {term.name: drawn(term) for term in method.terms})
    return student, {player.name: drawn(player) for player in method.followers}


def started(method: Method, batch: Batch, noise: StudentNoise) -> StudentNoise:
    """Returns the random numbers with z as each term in turn has it in the rows that are its own."""
    z = noise.z
    for term in method.terms:
        if term.rows is not None:
            # Of a student of several steps it is a `Start`: of the package's terms none that changes it goes with one.
            z = term.start(batch, z)  # type: ignore[arg-type]
    return noise._replace(z=z)


def fresh_inputs(
    method: Method, player: Player, key: jax.Array, frozen: Frozen, input_ids: jax.Array
) -> tuple[jax.Array, Text, Any]:
    """Returns z and the text of fresh samples, and a follower's random numbers for its update on them.

    `key` is the update's, of `keys_of_updates`; every follower of a step gets the same samples.
    """
    keys_of, batch_size = keys_of_update(key), input_ids.shape[0]
    z, noise = (
        owner.draw(keys_of(owner.name), batch_size, method.latent_shape) for owner in (method.student, player)
    )
    return z, encode_prompts(method, frozen, input_ids), noise


def fresh_samples(
    method: Method,
    params: Params,
    frozen: Frozen,
    z: jax.Array | Start,
    text: Text,
    programs: Programs = INLINE,
    place: Placement = ANYWHERE,
) -> jax.Array:
    """Returns the samples of a student, of which no gradient will be taken, in the passes of the update."""

    def one_pass(z: jax.Array | Start, text: Text) -> tuple[tuple, jax.Array]:
        x, t = _entered(method, params, frozen, z, text, programs, place)
        return (), programs.run(
            "student samples", method.student.forward, params, frozen, x, text, t, out=place.batch
        )

    return programs.average("fresh", one_pass, method.accumulate, (z, text))[1]


def _entered(
    method: Method,
    params: Params,
    frozen: Frozen,
    z: jax.Array | Start,
    text: Text,
    programs: Programs,
    place: Placement,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns what the student predicts its samples from, and at which timesteps: None for the first."""
    if not isinstance(z, Start):
        return z, None
    return programs.run("student steps", method.student.entered, params, frozen, z, text, out=place.batch)


def encode_prompts(method: Method, frozen: Frozen, input_ids: jax.Array) -> Text:
    """Encodes prompts for the networks."""
    return method.text_encoder.apply(frozen["text_encoder"], input_ids, method.latent_shape)


def encode(method: Method, frozen: Frozen, batch: Batch) -> Conditions:
    """Encodes the prompts, for the networks and for the terms."""
    text = encode_prompts(method, frozen, batch["input_ids"])
    return Conditions(text, {term.name: term.encode(frozen, batch) for term in method.terms})


def pull(
    method: Method,
    step: jax.Array,
    params: dict[str, Params],
    frozen: Frozen,
    x: jax.Array,
    conditions: Conditions,
    noise: dict[str, Any],
    prepared: dict[str, Any],
) -> tuple[jax.Array, Metrics]:
    """Returns d loss / d x, [B, h, w, C], and the metrics: all that the student's backward pass needs.

    The loss is the weighted sum of every term's mean over the batch, taken in as many parts of the batch, one
    after the other, as the term with the most `passes` asks for.
    """
    passes = max(term.passes for term in method.terms)

    def loss(
        x: jax.Array, conditions: Conditions, noise: dict[str, Any], prepared: dict[str, Any]
    ) -> tuple[jax.Array, Metrics]:
        weighted, metrics = [], {}
        for term in method.terms:
            own = (part.get(term.name) for part in (noise, conditions.encoded, prepared))
            losses, more = term.loss(Given(step, params, frozen, conditions.text, *own), x)
            mean = jnp.mean(losses)
            weighted.append(term.weight(step) * mean)
            metrics[f"loss/{term.name}"] = mean
            metrics |= {f"{term.name}/{name}": jnp.mean(value) for name, value in more.items()}
        # Not from 0: the first sum would be one more operation.
        return sum(weighted[1:], weighted[0]), metrics

    def one_pass(*args: Any) -> tuple[Metrics, jax.Array]:
        dx, metrics = jax.grad(loss, has_aux=True)(*args)
        return metrics, dx / passes

    metrics, dx = INLINE.average("pull", one_pass, passes, (x, conditions, noise, prepared))
    return dx, metrics


def student_gradient(
    method: Method,
    state: TrainState,
    frozen: Frozen,
    conditions: Conditions,
    noise: StudentNoise,
    programs: Programs = INLINE,
    place: Placement = ANYWHERE,
) -> tuple[Params, jax.Array, Metrics]:
    """Returns the gradient to the student's parameters, its samples x without gradient, and the metrics."""
    student, text = method.student, conditions.text
    params = {name: player.params for name, player in state.players.items()}

    def forward(
        trained: Params, frozen: Frozen, x: jax.Array, text: Text, t: jax.Array | None
    ) -> tuple[jax.Array, Callable]:
        return jax.vjp(lambda trained: student.forward(trained, frozen, x, text, t), trained)

    def prepare_of(own: Prepare) -> Callable:
        def prepare(step, params, frozen, x, text, noise, encoded):
            return own(Given(step, params, frozen, text, noise, encoded), x)

        return prepare

    # Outside of what the gradient is taken of: the earlier steps have none.
    start, t = _entered(method, state.student, frozen, noise.z, text, programs, place)
    x, backward = programs.run(
        "student forward", forward, state.student, frozen, start, text, t, out=(place.batch, None)
    )
    prepared = {
        term.name: programs.run(
            f"{term.name} prepare",
            prepare_of(term.prepare),
            *(state.step, params, frozen, x, text, noise.terms[term.name], conditions.encoded[term.name]),
            out=place.batch,
        )
        for term in method.terms
        if term.prepare is not None
    }
    dx, metrics = programs.run(
        "pull",
        lambda *args: pull(method, *args),
        *(state.step, params, frozen, x, conditions, noise.terms, prepared),
        out=(place.batch, place.whole),
    )
    (grads,) = programs.run("student backward", _pulled_back, backward, dx, out=(place.params(student.name),))
    return grads, x, metrics


def follower_gradient(
    player: Player,
    params: Params,
    frozen: Frozen,
    x: jax.Array,
    text: Text,
    noise: Any,
    programs: Programs = INLINE,
    place: Placement = ANYWHERE,
) -> tuple[Params, Metrics]:
    """Returns the gradient of a follower's mean loss on the samples x to its parameters, and the loss."""

    def forward(params: Params, *others: Any) -> tuple[jax.Array, Callable]:
        return jax.vjp(lambda params: jnp.mean(player.forward(params, *others)), params)

    value, backward = programs.run(
        f"{player.name} forward", forward, params, frozen, x, text, noise, out=(place.whole, None)
    )
    (grads,) = programs.run(
        f"{player.name} backward", _of_a_scalar, backward, out=(place.params(player.name),)
    )
    return grads, {f"loss/{player.name}": value}


def _pulled_back(backward: Callable, dx: jax.Array) -> tuple[Params]:
    return backward(dx)


def _of_a_scalar(backward: Callable) -> tuple[Params]:
    return backward(jnp.ones((), jnp.float32))
