"""Flat parameter dictionaries: leaf names, sizes, interpolation, casts.

Parameters are `dict[str, Array]` with dotted names that mirror diffusers and transformers, for example
`down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.kernel`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sbv2_jax.errors import InputError, listed

Params = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
# Parameters that are only read: of the devices, or of the host.
Arrays = Mapping[str, jax.Array | np.ndarray]

GIB = 2**30


def leaf_names(tree: Any) -> list[str]:
    """Returns the dotted name of every leaf of any pytree, in `jax.tree.leaves` order."""
    return [
        ".".join(_key_name(key) for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def count(params: Mapping[str, Any]) -> int:
    """Returns the number of scalars in a dictionary of arrays or of shapes."""
    return sum(leaf.size for leaf in params.values())


def nbytes(tree: Any) -> int:
    """Returns the bytes that the arrays, or shapes, of a pytree take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Casts the floating-point leaves of a pytree to `dtype` and leaves the others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def lerp(a: Params, b: Params, weight: float | jax.Array) -> Params:
    """Returns `weight * a + (1 - weight) * b`, in float32, in the dtype of `a`.

    Raises InputError, listing the leaves, where names or shapes differ.
    """
    require_same(a, b, "the first", "the second")

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        mixed = weight * x.astype(jnp.float32) + (1.0 - weight) * y.astype(jnp.float32)
        return mixed.astype(x.dtype)

    return {name: one(a[name], b[name]) for name in a}


def require_same(
    got: Mapping[str, Any],
    want: Mapping[str, Any],
    got_name: str,
    want_name: str,
) -> None:
    """Raises one InputError that lists every missing, extra or differently shaped leaf."""
    wrong = [f"missing {name} {want[name].shape}" for name in want if name not in got]
    wrong += [f"unexpected {name} {got[name].shape}" for name in got if name not in want]
    for name in want:
        if name not in got:
            continue
        if got[name].shape != want[name].shape:
            wrong.append(f"{name} has shape {got[name].shape}, expected {want[name].shape}")
    if wrong:
        raise InputError(f"{got_name} does not match {want_name} in {len(wrong)} leaves: {listed(wrong)}")
