"""A term of the student's objective: what it needs, what it prepares, and its loss for each sample."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
from ml_collections import ConfigDict

from sbv2_jax.distill.player import Player, Setting
from sbv2_jax.distill.random_numbers import NamedKeys
from sbv2_jax.distill.state import Frozen
from sbv2_jax.errors import InputError
from sbv2_jax.fields import imported, nearest
from sbv2_jax.models.conditions import Text
from sbv2_jax.tree import Params

# The terms of the package, by the names that `config.terms` has for them.
TERMS = {
    "vsd": "sbv2_jax.distill.terms.vsd:VSD",
    "clip": "sbv2_jax.distill.terms.clip:ClampedCLIP",
    "reward": "sbv2_jax.distill.terms.reward:ClampedReward",
    "gan": "sbv2_jax.distill.terms.gan:GAN",
    "regression": "sbv2_jax.distill.terms.regression:Regression",
}
# Those of a run whose configuration is older than `config.terms`.
_FORMER = ("vsd", "clip")


class Source(NamedTuple):
    """Where a frozen network comes from.

    `reference` is a directory, a hub id or "bundled", in which `folder` is looked for; or "vae" or "vae_tiny", of
    the teacher's own pipeline. `field` is the configuration's name for it, for messages.
    """

    reference: str
    folder: str
    field: str


class Column(NamedTuple):
    """A column of the batch: the shape of a row, its dtype, and the value in rows that are not the term's own."""

    shape: tuple[int, ...]
    dtype: str
    elsewhere: float = 0.0


class Rows(NamedTuple):
    """Rows of every batch that a term fills from data of its own: their prompts, and columns beside them.

    `reader`, "package.module:NAME" or "path/file.py:NAME", takes the configuration and returns a `RowSource`
    (`data.rows`); `count` of the rows of a batch, evenly spread, are filled from it, in an order that depends on the
    seed and the step alone. `field` is the configuration's name for the source, for messages.
    """

    reader: str
    field: str
    count: int  # type: ignore[assignment]  # in the place of a tuple's method, which nobody calls
    columns: Mapping[str, Column]


def rows_of(share: float, batch_size: int) -> int:
    """Returns how many rows of a batch a share of them is, at least one."""
    return max(1, round(share * batch_size))


class Given(NamedTuple):
    """What a term reads beside the samples, all of it without gradient.

    `params` is what is trained of each player, by name; `text` the conditions of the prompts; the last three are
    what the term's own `draw`, `encode` and `prepare` returned.
    """

    step: jax.Array
    params: dict[str, Params]
    frozen: Frozen
    text: Text
    noise: Any = None
    encoded: Any = None
    prepared: Any = None


Prepare = Callable[[Given, jax.Array], Any]


class Term:
    """One term of the student's objective; a subclass has a name and a `loss`, and overrides what else it needs.

    Class attributes: `name` in metrics ("loss/NAME"); `players`, the players beside the student that it needs;
    `columns`, the columns of the batch that it reads, each with the frozen CLIP whose tokenizer makes it of the
    prompts. `rows`, of the class or of the object, are those that it fills from data of its own. `passes` is in how
    many parts of the batch, one after the other, the loss is taken.
    """

    name: ClassVar[str]
    players: ClassVar[tuple[type[Player], ...]] = ()
    columns: ClassVar[Mapping[str, str]] = {}
    rows: Rows | None = None
    passes: int = 1
    # `prepare(given, x)` returns what `loss` is given as `given.prepared`, [B, ...]: without gradient, and as a
    # stage of its own. None where nothing is prepared.
    prepare: Prepare | None = None

    @classmethod
    def sources(cls, config: ConfigDict) -> dict[str, Source]:
        """Returns the frozen networks that it needs, by the names that `Frozen` has for them."""
        return {}

    @classmethod
    def build(cls, config: ConfigDict, setting: Setting) -> Self | None:
        """Returns the term of a run, or None where the configuration asks for none."""
        return cls()

    def weight(self, step: jax.Array) -> float | jax.Array:
        """Returns its weight in the objective at this step."""
        return 1.0

    def draw(self, keys: NamedKeys, batch_size: int, latent_shape: tuple[int, ...]) -> Any:
        """Returns its random numbers of a step, [B, ...]."""

    def start(self, batch: Mapping[str, jax.Array], z: jax.Array) -> jax.Array:
        """Returns z, [B, h, w, C], of the student's samples, with another noise in rows of its own, if it has any."""
        return z

    def encode(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> Any:
        """Returns what it makes of its columns, [B, ...], once a step."""

    def loss(self, given: Given, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss [B] of the samples x, float32 [B, h, w, C], and metrics: "NAME/..." each, [B] or scalars.

        The step takes the mean over the batch, and the gradient to x.
        """
        raise NotImplementedError


def term_classes(config: ConfigDict) -> list[type[Term]]:
    """Returns the terms that `config.terms` names: of the package, "package.module:Class" or "path/file.py:Class".

    A configuration older than that field has the first two. Raises InputError for what cannot be imported, is
    no term, or has the name of another.
    """
    found = [_term_class(spec) for spec in config.get("terms", _FORMER)]
    names = [term.name for term in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"config.terms has two terms of the name {', '.join(map(repr, twice))}")
    return found


def needed_sources(config: ConfigDict, terms: Sequence[type[Term]]) -> dict[str, Source]:
    """Returns the frozen networks that terms need; raises InputError where two mean another by one name."""
    found: dict[str, Source] = {}
    for term in terms:
        for name, source in term.sources(config).items():
            if found.setdefault(name, source)[:2] != source[:2]:
                raise InputError(
                    f"the term {term.name!r} needs another frozen network {name!r} than a term before it: "
                    f"{source.reference!r} and {found[name].reference!r}"
                )
    return found


def _term_class(spec: str) -> type[Term]:
    module, _, attribute = TERMS.get(spec, spec).rpartition(":")
    if not module or not attribute:
        raise InputError(
            f'config.terms: {spec!r} is none of {", ".join(TERMS)}, nor "package.module:Class" or "file.py:Class"'
            f"{nearest(spec, TERMS, prefix='')}"
        )
    found = imported(f"{module}:{attribute}", "config.terms", spec)
    wrong = [
        name
        for name in ("build", "sources", "loss", "weight", "draw", "start", "encode", "rows")
        if not hasattr(found, name)
    ]
    if wrong or not isinstance(getattr(found, "name", None), str):
        raise InputError(f"config.terms: {spec} is no term: derive it from {__name__}.Term, with a `name`")
    return found
