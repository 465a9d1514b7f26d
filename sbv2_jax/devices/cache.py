"""Where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax


def use_cache(directory: Path | None = None) -> None:
    """Keeps compiled programs on the disk, unless JAX was already told where, or not to.

    They go to `directory`, or without one to `$XDG_CACHE_HOME/sbv2_jax` or `~/.cache/sbv2_jax`; JAX's own
    `JAX_COMPILATION_CACHE_DIR` names another place, and `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(directory or Path(home) / "sbv2_jax"))
