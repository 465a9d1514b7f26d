"""Rows of a batch that come from a source of their own, with prompts and columns, among those of the prompts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, SupportsIndex

import numpy as np

from sbv2_jax.data.prompts import shuffled
from sbv2_jax.errors import InputError


class Row(NamedTuple):
    """A row of a batch: its prompt, and its entry of each column, by name."""

    prompt: str
    columns: Mapping[str, np.ndarray | np.generic]


class RowSource(Protocol):
    """A random-access source of rows (grain's protocol) that can say what it holds.

    `made_from` holds the SHA-256 of what the rows were made from, by the name that a run's sources have for it, and
    must be the run's own: such as that of the teacher that drew them.
    """

    made_from: Mapping[str, str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...

    def fingerprint(self) -> str:
        """Returns a SHA-256 over everything that decides which row has which index."""
        ...


def spread(count: int, among: Sequence[int]) -> list[int]:
    """Returns `count` of these numbers, evenly spread; raises InputError where there are fewer."""
    if count > len(among):
        raise InputError(f"{count} rows of a batch are asked for, and {len(among)} are left")
    return [among[(2 * number + 1) * len(among) // (2 * count)] for number in range(count)]


class Filling:
    """Fills rows of every batch from a source.

    Args:
      source: of the rows.
      elsewhere: what stands in the other rows of each column, by its name: an array of a row's shape and dtype.
      rows: the numbers of the rows, of the global batch.
      seed: of the order. Every epoch is a new permutation, and a batch may span two.
      name: of the source, for messages.

    Raises InputError for a source that does not fill a batch, and for columns of another shape or dtype.
    """

    def __init__(
        self,
        source: RowSource,
        elsewhere: Mapping[str, np.ndarray],
        rows: Sequence[int],
        seed: int,
        name: str,
    ):
        self._elsewhere, self._rows = dict(elsewhere), list(rows)
        if len(source) < len(rows):
            raise InputError(f"{name}: {len(source)} rows, and each batch takes {len(rows)}")
        first = source[0].columns
        for column, other in self._elsewhere.items():
            there = first.get(column)
            if there is None or (there.shape, there.dtype) != (other.shape, other.dtype):
                found = "missing" if there is None else f"{there.dtype} {list(there.shape)}"
                raise InputError(
                    f"{name}: its {column} are {found}, this run's {other.dtype} {list(other.shape)}"
                )
        self._stream = shuffled(source, seed)

    def fill(
        self, step: int, prompts: Sequence[str], first: int = 0
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """Returns the prompts of a global step with those of the source in its rows, and the columns, [B, ...].

        `prompts` are those of the rows from `first` on, such as one process holds. What is filled in depends on the
        seed, the step and the row's number alone. Raises InputError as the source does.
        """
        prompts = list(prompts)
        columns = {name: np.stack([other] * len(prompts)) for name, other in self._elsewhere.items()}
        for place, row in enumerate(self._rows):
            if first <= row < first + len(prompts):
                own = self._stream[step * len(self._rows) + place]
                prompts[row - first] = own.prompt
                for name, column in columns.items():
                    column[row - first] = own.columns[name]
        return prompts, columns
