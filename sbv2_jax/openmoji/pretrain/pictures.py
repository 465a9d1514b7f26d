"""Pictures as the networks take them and back, and a function over more rows than fit at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BATCH = 32


def to_float(pictures: jax.Array) -> jax.Array:
    """Returns uint8 pictures of any shape as float32 in [-1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Returns float pictures of any shape in [-1, 1] as uint8, clipped and rounded."""
    return np.round(np.clip(images * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)


def in_batches(apply: Callable[[Any, Any], jax.Array], params: Any, rows: Any) -> np.ndarray:
    """Returns `apply(params, rows)`, computed for a few rows at a time; `apply` is jitted.

    rows: a pytree of arrays [N, ...]; the result is one array [N, ...].
    """
    parts = []
    total = len(jax.tree.leaves(rows)[0])
    for start in range(0, total, _BATCH):
        count = min(_BATCH, total - start)
        # The last batch repeats its last row, so that one program serves all.
        index = np.minimum(np.arange(start, start + _BATCH), total - 1)
        batch = jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), rows)
        parts.append(np.asarray(apply(params, batch))[:count])
    return np.concatenate(parts)
