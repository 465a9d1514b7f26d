"""The user's cache, and where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax


def user_cache() -> Path:
    """Returns the directory of what can be made again: `$XDG_CACHE_HOME/sbv2_jax`, or `~/.cache/sbv2_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sbv2_jax"


def use_cache(directory: Path | None = None) -> None:
    """Keeps compiled programs on the disk, unless JAX was already told where, or not to.

    They go to `directory`, or without one to `user_cache()`; JAX's own `JAX_COMPILATION_CACHE_DIR` names another
    place, and `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # JAX declares none of them
        jax.config.update("jax_compilation_cache_dir", str(directory or user_cache()))
