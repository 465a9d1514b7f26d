"""Checkpoints that are verified when they are read: Orbax arrays plus a manifest of SHA-256 digests.

A step is a directory `<step>/` with the Orbax item `state`, a flat dictionary of named arrays, and
`manifest.json`.
"""

from sbv2_jax.checkpoint.manifest import CheckpointError
from sbv2_jax.checkpoint.restore import load
from sbv2_jax.checkpoint.save import Checkpoints

__all__ = ["CheckpointError", "Checkpoints", "load"]
