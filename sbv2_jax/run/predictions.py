"""What teacher and score model make of the student's samples: the two x0 whose difference trains it, as pictures."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sbv2_jax.diffusion.schedule import add_noise, classifier_free_guidance, rounded, to_x0
from sbv2_jax.distill.score import Score
from sbv2_jax.distill.state import Frozen, TrainState
from sbv2_jax.distill.student import rollout
from sbv2_jax.generate.inference import decode
from sbv2_jax.models.conditions import like
from sbv2_jax.run.build import Run
from sbv2_jax.run.generators import teacher_generator
from sbv2_jax.tree import Params


def times(run: Run) -> tuple[int, ...]:
    """Returns the timesteps at which the pictures are predicted: a quarter, half and three quarters of the way.

    None without a score model.
    """
    if Score.name not in run.method.players:
        return ()
    count = run.method.players[Score.name].schedule.num_timesteps
    return tuple(count * quarter // 4 for quarter in (1, 2, 3))


def predicted(
    run: Run,
    state: TrainState,
    frozen: Frozen,
    vae: Params,
    ids: jax.Array,
    z: jax.Array,
    noise: jax.Array,
    again: jax.Array | None = None,
    *,
    at: Sequence[int],
) -> jax.Array:
    """Returns pictures, float32 [2, len(at), B, H, W, 3] in [0, 1]: the teacher's x0, then the score model's.

    The student that is trained makes x of z, [B, h, w, C], one of several steps of `again` too; `noise` takes it to
    each timestep of `at`, from where both predict x0 with the guidance of the run. One copy of each network is
    compiled, whatever `at` holds.
    """
    method, score = run.method, run.method.players[Score.name]
    schedule = score.schedule
    text = method.text_encoder.apply(frozen["text_encoder"], ids, method.latent_shape)
    null = like(frozen["null_text"], text)
    student = method.student
    x = rollout(
        *(student.network, student.schedule, student.weights(state.student, frozen), z, text, again),
        dtype=student.compute_dtype,
        lora_scale=student.lora_scale,
    )
    weights = score.weights(state.players[Score.name].params, frozen)

    def x0(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        timestep, lora_scale, guidance = row
        t = jnp.full(x.shape[:1], timestep, jnp.int32)
        x_t = rounded(add_noise(schedule, x, noise, t), score.compute_dtype)

        def output(conditional: jax.Array) -> jax.Array:
            given = jax.tree.map(lambda own, none: jnp.where(conditional, own, none), text, null)
            return score.network.apply(
                weights, x_t.astype(score.compute_dtype), t, *given, lora_scale=lora_scale
            ).astype(jnp.float32)

        unconditional, conditional = jax.lax.map(output, jnp.array([False, True]))
        guided = classifier_free_guidance(conditional, unconditional, guidance)
        return decode(teacher_generator(run), vae, to_x0(schedule, guided, x_t, t))

    rows = [
        (timestep, lora_scale, guidance)
        for lora_scale, guidance in (
            (0.0, max(1.0, run.guidance)),  # at 1 the unconditional output does not count
            (score.lora_scale, max(1.0, run.score_guidance)),
        )
        for timestep in at
    ]
    steps, scales, guidances = zip(*rows, strict=True)
    pictures = jax.lax.map(x0, (jnp.array(steps), jnp.array(scales), jnp.array(guidances, jnp.float32)))
    return pictures.reshape(2, len(at), *pictures.shape[1:])
