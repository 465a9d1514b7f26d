"""Uniform numbers that are a pure function of a key, the same on every machine and library version."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def uniforms(*key: object) -> Iterator[float]:
    """Yields endless floats in [0, 1), from SHA-256 over the key and a block count.

    Not numpy's generators: their methods may change between versions (NEP 19), and a published world may not.
    """
    name = "/".join(map(str, key))
    block = 0
    while True:
        digest = hashlib.sha256(f"{name}/{block}".encode()).digest()
        for at in range(0, 32, 8):
            yield (int.from_bytes(digest[at : at + 8], "big") >> 11) / 2**53
        block += 1


def pick(draws: Iterator[float], options: Sequence[T]) -> T:
    """Returns one of the options, each equally likely."""
    return options[int(next(draws) * len(options))]


def between(draws: Iterator[float], low: float, high: float) -> float:
    """Returns a float in [low, high)."""
    return low + (high - low) * next(draws)
