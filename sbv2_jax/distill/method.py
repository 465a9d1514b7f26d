"""The method of a run: the players that it trains, and the terms of the student's objective."""

import dataclasses

import optax

from sbv2_jax.distill.player import Player
from sbv2_jax.distill.student import Student
from sbv2_jax.distill.terms.term import Rows, Term
from sbv2_jax.models.conditions import TextEncoder


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """Everything static that a step depends on.

    `followers` are the players beside the student, each updated on the student's samples. `accumulate` is in how
    many passes one update is taken, `ema` the decay of the averaged student.
    """

    student: Student
    followers: tuple[Player, ...] = ()
    terms: tuple[Term, ...]
    text_encoder: TextEncoder
    latent_shape: tuple[int, int, int]
    accumulate: int = 1
    ema: float = 0.0

    @property
    def players(self) -> dict[str, Player]:
        """All players by name, the student first."""
        return {player.name: player for player in (self.student, *self.followers)}

    @property
    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """The optimizer of each player."""
        return {name: player.optimizer for name, player in self.players.items()}

    @property
    def updates(self) -> int:
        """The most updates that a step has of a follower; all but one of them take a batch of prompts of their own."""
        return max((player.updates for player in self.followers), default=1)

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the terms read, each with the frozen CLIP whose tokenizer makes it of the prompts."""
        return {column: clip for term in self.terms for column, clip in term.columns.items()}

    @property
    def rows(self) -> dict[str, Rows]:
        """The rows that terms fill from data of their own, by the names of the terms."""
        return {term.name: term.rows for term in self.terms if term.rows is not None}
