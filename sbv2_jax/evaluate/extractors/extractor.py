"""Features of pictures by one network: what every distance between sets of pictures is taken over."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sbv2_jax.evaluate.extractors.program import Program, check_pictures, joined

# Makes of one picture, uint8 [H, W, 3], the network's input [side, side, 3].
Resize = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Extractor:
    """A network with its preprocessing, from pictures to features.

    `name` is a key of `EXTRACTORS`; `fingerprint` a SHA-256 over weights and preprocessing. `is_published` says of
    weights whose SHA-256 is known that they are the published ones, and of all others False. `resize(picture, side)`
    is a function of `evaluate.resize`.
    """

    name: str
    fingerprint: str
    resize: Resize
    side: int
    program: Program
    is_published: bool = False

    def __call__(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """Returns "features", float32 [N, D], of pictures, uint8 [N, H, W, 3].

        A network that classifies gives "probabilities" [N, C] as well. Raises ValueError for other arrays.
        """
        check_pictures(pictures)
        if not len(pictures):
            one = self.resize(np.zeros((1, 1, 3), np.uint8), self.side)
            return self.program.empty((np.stack([one] * self.program.size),))
        return joined(self.stream([pictures]))

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Yields what a call returns, in the pictures' order and in pieces of the program's size.

        `batches` are uint8 [N, H, W, 3], of any N, and H and W of their own. How many come at a time changes no bit.
        """
        return self.program.stream(lambda picture: (self.resize(picture, self.side),), _pictures(batches))


def _pictures(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for batch in batches:
        check_pictures(batch)
        yield from batch
