"""What the networks of a protocol see in pictures, kept on disk piece by piece: what is killed goes on."""

import contextlib
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sbv2_jax.convert.formats.files import replaced_file
from sbv2_jax.evaluate.extractors.program import joined
from sbv2_jax.evaluate.pictures import Pictures
from sbv2_jax.evaluate.protocol import Panel, Protocol
from sbv2_jax.evaluate.sources import Source
from sbv2_jax.generate.pictures import save_png
from sbv2_jax.tree import Params

PIECE = 64  # pictures of one file: what a kill can cost
_SHOWN = 24
_READERS = 4

# Of a panel, by its label: "features", "probabilities" or "similarity", a row for each picture.
Seen = dict[str, dict[str, np.ndarray]]


class Networks:
    """The networks of a protocol's panels, by label; raises InputError where one cannot be opened."""

    def __init__(self, panels: Sequence[Panel]):
        self.panels = {panel.label: panel for panel in panels}
        self._open = {panel.label: panel.open() for panel in panels}

    def __getitem__(self, label: str) -> Any:
        return self._open[label]

    @property
    def params(self) -> dict[str, Params]:
        """The parameters of each network, which every device holds."""
        return {label: network.program.params for label, network in self._open.items()}

    def see(
        self, label: str, pictures: Sequence[np.ndarray], captions: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Returns what a panel's network sees in pictures, uint8 [H, W, 3], and their captions."""
        panel, network = self.panels[label], self[label]
        # One by one, for their sizes may differ; the network makes batches of its own.
        singly = (picture[None] for picture in pictures)
        if panel.captions:
            pairs = zip(singly, ([text] for text in captions), strict=True)
            return {"similarity": np.concatenate(list(network.stream(pairs, prefix=panel.prefix)))}
        return joined(network.stream(singly))


def of_source(protocol: Protocol, networks: Networks, source: Source, directory: Path) -> tuple[Seen, float]:
    """Returns what the panels see in the pictures of a source, and how many pictures were drawn a second.

    The pieces lie in `directory`; those that are there are not drawn again (the rate is 0 where all are). The first
    pictures are kept as PNG files beside them, for the report.
    """
    seconds, drawn = 0.0, 0

    def see(rows: range, pool: ThreadPoolExecutor) -> Seen:
        nonlocal seconds, drawn
        texts, begin = [protocol.prompts[row] for row in rows], time.perf_counter()
        pictures = source.draw(rows, texts)
        seconds, drawn = seconds + time.perf_counter() - begin, drawn + len(rows)
        pictures = list(pool.map(protocol.prepare, pictures))
        for row in (row for row in rows if row < _SHOWN):
            save_png(shown_path(directory, row), pictures[row - rows.start])
        return {label: networks.see(label, pictures, texts) for label in networks.panels}

    seen = _in_pieces(directory, len(protocol.prompts), source.name, see)
    return seen, drawn / seconds if seconds else 0.0


def shown_path(directory: Path, row: int) -> Path:
    """Returns the path of a picture that is kept for the report."""
    return directory / f"{row:05d}.png"


def of_pictures(
    protocol: Protocol, networks: Networks, label: str, pictures: Pictures, cache: Path
) -> dict[str, np.ndarray]:
    """Returns what one panel's network sees in real pictures.

    It is kept in `cache` by what it depends on: the pictures' content, the network and what is done to pictures.
    """
    key = digest(pictures.fingerprint(), networks[label].fingerprint, protocol.prepared)

    def see(rows: range, pool: ThreadPoolExecutor) -> Seen:
        read = list(pool.map(lambda row: protocol.prepare(pictures[row]), rows))
        return {label: networks.see(label, read, [""] * len(read))}

    return _in_pieces(cache / key[:16], len(pictures), f"real pictures, {label}", see)[label]


def _in_pieces(
    directory: Path, count: int, name: str, see: Callable[[range, ThreadPoolExecutor], Seen]
) -> Seen:
    """Returns what `see` gives for `count` rows, piece by piece, each written to `directory` when it is there."""
    pieces = []
    bar = tqdm(total=count, desc=name, unit="picture", mininterval=2, leave=False)
    with bar, ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, count, PIECE):
            rows, path = range(start, min(start + PIECE, count)), directory / f"{start // PIECE:05d}.npz"
            if (piece := _read(path)) is None:
                piece = see(rows, pool)
                _write(path, piece)
            pieces.append(piece)
            bar.update(len(rows))
    return whole(pieces)


def whole(pieces: Sequence[Seen]) -> Seen:
    """Returns what was seen piece by piece, all rows of it."""
    return {
        label: {name: np.concatenate([piece[label][name] for piece in pieces]) for name in columns}
        for label, columns in pieces[0].items()
    }


def digest(*values: Any) -> str:
    """Returns one SHA-256 over values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(path: Path, seen: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    # Any, for savez has arguments of other types too.
    arrays: dict[str, Any] = {
        f"{label}/{name}": array for label, columns in seen.items() for name, array in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> Seen | None:
    """Returns the arrays of a piece, or None where there is none that is whole."""
    seen: Seen = {}
    with contextlib.suppress(FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError, KeyError):
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                label, _, column = name.rpartition("/")
                seen.setdefault(label, {})[column] = stored[name]
        return seen
    return None
