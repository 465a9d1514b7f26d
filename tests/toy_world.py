"""Networks of a few parameters each, to try the rules of a step on programs that compile at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sbv2_jax.diffusion.schedule import Schedule, ScheduleConfig, make_schedule
from sbv2_jax.distill.gradients import FRESH, fresh_inputs
from sbv2_jax.distill.method import Method
from sbv2_jax.distill.random_numbers import keys_of_updates
from sbv2_jax.distill.score import Score
from sbv2_jax.distill.state import TrainState, init_state
from sbv2_jax.distill.student import Student
from sbv2_jax.distill.terms.clip import ClampedCLIP
from sbv2_jax.distill.terms.vsd import VSD
from sbv2_jax.distill.train_step import make_train_step
from sbv2_jax.models import lora
from sbv2_jax.models.clip import TextOutput
from sbv2_jax.models.conditions import Text, TextEncoder
from sbv2_jax.models.layers import Embed, Linear
from sbv2_jax.models.network import Network
from sbv2_jax.tree import cast

BATCH, LATENTS, VOCABULARY = 8, (2, 2, 3), 12


class Table(nnx.Module):
    """A table of vectors in place of a text tower."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = Embed(VOCABULARY, 4, rngs)

    def __call__(self, input_ids: jax.Array) -> TextOutput:
        states = self.table(input_ids)
        return TextOutput(states, states[:, 0])


class Denoiser(nnx.Module):
    """Two dense layers over latents, time and text in place of a UNet."""

    def __init__(self, rngs: nnx.Rngs):
        self.to_q = Linear(3, 6, rngs=rngs)
        self.text = Linear(4, 6, rngs=rngs)
        self.time = Linear(1, 6, rngs=rngs)
        self.out = Linear(6, 3, rngs=rngs)

    def __call__(
        self, latents: jax.Array, timesteps: jax.Array, context: jax.Array, added: None
    ) -> jax.Array:
        time = self.time((timesteps[:, None] / 1000).astype(latents.dtype))
        hidden = self.to_q(latents) + (self.text(context.mean(1)) + time)[:, None, None]
        return self.out(jnp.tanh(hidden))


class Toy:
    """A run of toy networks with the CLIP loss; `changes` are as for `changed`."""

    def __init__(self, dtype: jnp.dtype = jnp.float32, **changes):
        text, student = Network(Table), Network(Denoiser)
        score = Network(lambda rngs: lora.attach(Denoiser(rngs), "to_q", 2, rngs))
        rng = np.random.default_rng(0)

        def params(network: Network) -> dict[str, jax.Array]:
            return {
                name: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 2)
                for name, leaf in network.shapes.items()
            }

        self.optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-4))
        schedule = make_schedule(ScheduleConfig(prediction_type="v_prediction"))
        teacher, self.score = lora.base_and_factors(params(score))
        self.student = params(student)
        picture, word = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((12, 5), (4, 5)))
        common = {"schedule": schedule, "optimizer": self.optimizer, "compute_dtype": dtype}
        score = Score(network=score, base="teacher", **common)
        clip = ClampedCLIP(
            decode=lambda p, x: jnp.tanh(p["gain"] * x.astype(dtype)),
            image_features=lambda p, x: x.reshape(x.shape[0], -1) @ p["picture"],
            text_features=lambda p, ids: p["table"][ids[:, 0]] @ p["word"],
            steps=20,
            first=0.5,
        )
        method = Method(
            student=Student(network=student, **common),
            followers=(score,),
            terms=(VSD(score=score), clip),
            text_encoder=TextEncoder({"text_encoder": text}),
            latent_shape=LATENTS,
        )
        text_params = params(text)
        frozen = {
            "teacher": teacher,
            "text_encoder": text_params,
            "null_text": Text(text_params["table.embedding"][np.zeros(3, np.int32)]),
            "decoder": {"gain": jnp.float32(0.8)},
            "clip": {"picture": picture, "word": word, "table": params(text)["table.embedding"]},
        }
        self.frozen = cast(frozen, dtype)
        ids, clip_ids = (rng.integers(1, VOCABULARY - 1, (BATCH, 3)).astype(np.int32) for _ in range(2))
        self.batch = {"input_ids": ids, "clip_input_ids": clip_ids}
        # The prompts of two more updates of the score model.
        self.fresh = {FRESH: rng.integers(1, VOCABULARY - 1, (2, BATCH, 3)).astype(np.int32)}
        self.method = changed(method, **changes)

    def init(self, seed: int = 0, ema: bool = True) -> TrainState:
        copies = jax.tree.map(jnp.copy, {"student": self.student, "score": self.score})
        return init_state(seed, copies, self.method.optimizers, ema)

    def train_step(self, jit: dict | None = None, **changes):
        """Returns the jitted step, with the method `changed` so, and arguments for `jax.jit`."""
        return jax.jit(make_train_step(changed(self.method, **changes)), **(jit or {}))


def few_step_schedule(timesteps: tuple[int, ...]) -> Schedule:
    """The schedule of a toy student of these timesteps."""
    config = ScheduleConfig(prediction_type="v_prediction", timesteps=timesteps)
    return make_schedule(config)


def drawn_afresh(step, number, *, count, batch_size=BATCH, seed=0):
    """z and the score model's random numbers of one of a step's `count` updates on fresh samples."""
    toy = Toy(latent_shape=(2, 2, 1))
    method, ids = toy.method, np.zeros((batch_size, 3), np.int32)
    key = jax.random.key_data(jax.random.key(seed))
    keys = jax.jit(keys_of_updates, static_argnums=2)(key, step, count)
    fresh = jax.jit(lambda key: fresh_inputs(method, method.players["score"], key, toy.frozen, ids))
    z, _, noise = fresh(keys[number])
    return z, noise


def changed(method: Method, **changes) -> Method:
    """Returns the method with fields of its own, or of a player or a term ("vsd__scale"), changed."""
    owners = {**method.players, **{term.name: term for term in method.terms}}
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        if owner:
            owners[owner] = dataclasses.replace(owners[owner], **{field: value})
        else:
            method = dataclasses.replace(method, **{field: value})
    if "vsd" in owners:
        owners["vsd"] = dataclasses.replace(owners["vsd"], score=owners["score"])
    return dataclasses.replace(
        method,
        student=owners["student"],
        followers=tuple(owners[player.name] for player in method.followers),
        terms=tuple(owners[term.name] for term in method.terms),
    )
