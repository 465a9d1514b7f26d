"""The base of the networks' modules."""

from typing import Any

from flax import nnx


class NoPytree:
    """Makes an NNX class one that is no pytree by itself: its attributes are then set without NNX's checks.

    Every network is split once, when it is built, and only its parameters are passed around. The checks took half
    of the time that a network of Stable Diffusion's size takes to build, which loading waits for.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(pytree=False, **kwargs)  # type: ignore[call-arg]  # that of nnx.Pytree


class Module(NoPytree, nnx.Module):
    """An NNX module that is no pytree by itself."""
