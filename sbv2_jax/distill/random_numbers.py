"""The random keys of a training step, each of a name of its own, so that a new one moves none of the others."""

import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# A key for a name such as "noise", within the term or player that asks for it.
NamedKeys = Callable[[str], jax.Array]

# These share out one split of the step's key; every other name has a key from the checksum of its letters.
_FIRST = ("student/z", "vsd/noise", "vsd/t", "score/noise", "score/t", "score/null")


def keys_of_step(root: jax.Array, step: jax.Array | int) -> Callable[[str], NamedKeys]:
    """Returns, for the name of a term or player, its keys by name; `root` is the run's raw key, uint32 [2].

    They depend on the root key, the step and the two names alone: not on the mesh, nor on what else is trained.
    """
    of_the_step = jax.random.fold_in(jax.random.wrap_key_data(root), step)
    first = dict(zip(_FIRST, jax.random.split(of_the_step, len(_FIRST)), strict=True))

    def keys_of(owner: str) -> NamedKeys:
        def key(name: str) -> jax.Array:
            full = f"{owner}/{name}"
            return (
                first[full] if full in first else jax.random.fold_in(of_the_step, zlib.crc32(full.encode()))
            )

        return key

    return keys_of


def keys_of_updates(root: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """Returns a raw key for each of `count` updates on fresh samples, uint32 [count, 2].

    Each depends on the root key, the step and the number of its update alone, not on how many there are.
    """
    key = keys_of_step(root, step)("fresh")("updates")
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count)))


def keys_of_update(key: jax.Array) -> Callable[[str], NamedKeys]:
    """Returns, for the name of a player, its keys by name; `key` is one of `keys_of_updates`."""

    def keys_of(owner: str) -> NamedKeys:
        return lambda name: jax.random.fold_in(
            jax.random.wrap_key_data(key), zlib.crc32(f"{owner}/{name}".encode())
        )

    return keys_of


def initial_noise(
    seed: int | jax.Array, indices: Sequence[int] | jax.Array, latent_shape: tuple[int, ...]
) -> jax.Array:
    """Returns standard normal noise [len(indices), h, w, c], each sample's from the seed and its index alone.

    `seed`, below 2^32, is that of all samples, or [len(indices)] of each. The numbers are threefry's, whatever
    generator JAX is told to use: the same on every machine.
    """
    indices = jnp.asarray(indices, jnp.uint32)

    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.normal(key, latent_shape)

    return jax.vmap(one)(jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), indices.shape), indices)


def further_noise(
    seed: int, indices: Sequence[int], latent_shape: tuple[int, ...], count: int
) -> jax.Array | None:
    """Returns the noise of `count` further steps, [len(indices), count, h, w, c], or None for none of them.

    Each sample's depends on the seed, its index and the number of the step alone.
    """
    if count == 0:
        return None
    # A root of their own, so that no key that is drawn from is derived from.
    root = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(b"again"))

    def one(index: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, number), index)
        return jax.random.normal(key, latent_shape)

    of_steps = jax.vmap(one, (None, 0))
    return jax.vmap(of_steps, (0, None))(jnp.asarray(indices, jnp.uint32), jnp.arange(1, count + 1))
