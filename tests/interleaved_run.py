"""The VSD gradient and guided sampling over 2 x 4 x 1 devices, for `test_interleaved.py`: one line of JSON out."""

import json
import re
from unittest import mock

import conftest  # noqa: F401  (its settings of JAX)
import jax
import jax.numpy as jnp
import numpy as np
from toy_world import LATENTS, Toy

from sbv2_jax.devices.sharding import batch_sharding, make_mesh
from sbv2_jax.diffusion import samplers
from sbv2_jax.diffusion.samplers import guided, sample
from sbv2_jax.distill.gradients import encode, random_numbers
from sbv2_jax.distill.terms import vsd as vsd_file
from sbv2_jax.distill.terms.term import Given
from sbv2_jax.models.conditions import like

# One batch behind the other, as it must not be done.
BEHIND = {
    "interleaved": lambda *trees: jax.tree.map(lambda *rows: jnp.concatenate(rows), *trees),
    "separated": lambda rows, count: jnp.split(rows, count),
}


def main() -> None:
    toy = Toy()
    vsd, params = toy.method.terms[0], {"score": toy.score}
    text = encode(toy.method, toy.frozen, toy.batch).text
    noise, _ = random_numbers(toy.method, toy.init().key, 0, text.context.shape[0])

    def gradient(x, text, noise):
        return vsd.prepare(Given(0, params, toy.frozen, text, noise), x)

    def pictures(z, text, noise):
        network = toy.method.student.network

        def apply(x, t, text):
            return network.apply(toy.student, x, t, *text)

        null = like(toy.frozen["null_text"], text)
        return sample(guided(apply, text, null, 3.0), toy.method.student.schedule, z, steps=4)

    mesh = make_mesh(2, 4, 1)
    assert noise.z.shape[1:] == LATENTS and jnp.std(noise.z) > 0.5
    found = {}
    for name, function in {"gradient": gradient, "pictures": pictures}.items():
        inputs = (noise.z, text, noise.terms["vsd"])
        one = jax.jit(function)(*inputs)
        split = jax.device_put(inputs, batch_sharding(mesh))
        program = jax.jit(function, out_shardings=batch_sharding(mesh)).lower(*split).compile()
        kinds = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
        found[name] = {
            "collectives": [match[0] for match in re.finditer(kinds, program.as_text())],
            "error": float(np.abs(program(*split) - one).max() / np.abs(one).max()),
        }
        with mock.patch.multiple(samplers, **BEHIND), mock.patch.multiple(vsd_file, **BEHIND):
            behind = jax.jit(lambda *inputs: function(*inputs))  # noqa: B023 (traced here)
            found[name]["same"] = bool(np.array_equal(behind(*inputs), one))
            program = jax.jit(lambda *inputs: function(*inputs), out_shardings=batch_sharding(mesh))  # noqa: B023
            moved = re.findall(kinds, program.lower(*split).compile().as_text())
            found[name]["behind"] = len(moved)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
