"""Prompts out of tables and objects: CSV and TSV, JSON and JSON Lines, Parquet.

Each reader yields (place, value) in the order of the file, such as ("line 7", "a cat"): a value is a string, or
None where the file has none. `notes` is told what the reader guessed.
"""

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sbv2_jax.data.columns import HOW, choose, described, leaves, usual
from sbv2_jax.data.kinds import DELIMITERS
from sbv2_jax.data.streams import MAX_TEXT, PACKED, lines, pyarrow
from sbv2_jax.errors import InputError

Values = Iterator[tuple[str, Any]]


def table(path: Path, column: str, notes: list[str]) -> Values:
    """Reads CSV or TSV, whose first row names the columns; quotes and doubled quotes as RFC 4180 has them.

    Raises InputError, with the line, for a row of another length than the first, and for stray quotes.
    """
    numbered = lines(path)
    start, first = next(((number, line) for number, line in numbered if line.strip()), (1, ""))
    delimiter = _delimiter(path, first, column)
    text = itertools.chain([first + "\n"], (line + "\n" for _, line in numbered))
    rows = csv.reader(text, delimiter=delimiter, strict=True)

    def place() -> str:
        return f"line {start - 1 + rows.line_num}"

    try:
        names = [name.strip() for name in next(rows, [])]
        chosen = choose(names, column, str(path))
        if not column:
            notes.append(f"{path}: {described(chosen, names)}")
        at = names.index(chosen)
        for row in rows:
            if row and len(row) != len(names):
                raise InputError(
                    f"{path}, {place()}: {len(row)} fields, and its first row names {len(names)}: put a field "
                    f"with {delimiter!r} in it into quotes"
                )
            if row:
                yield place(), row[at]
    except csv.Error as error:
        raise InputError(f"{path}, {place()}: not a row of a table: {error}") from error


def _delimiter(path: Path, first: str, column: str) -> str:
    """Returns what separates the columns: the first delimiter that sets the wanted name apart."""
    tabs = any(suffix in (".tsv", ".tab") for suffix in path.suffixes)
    order = "\t" + DELIMITERS if tabs else DELIMITERS
    for delimiter in order:
        try:
            names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        except csv.Error:
            continue
        if (column in names) if column else usual(names):
            return delimiter
    return order[0]


def objects(path: Path, column: str, notes: list[str]) -> Values:
    """Reads JSON Lines, or JSON: strings, objects, objects of lists such as COCO's captions file.

    A column may be a path of keys, as in `annotations.caption`; of lists on the way every entry is read.
    Raises InputError, with the line, for what is not JSON, and for one JSON text of more than 1 GiB.
    """
    numbered = ((number, line) for number, line in lines(path) if line.strip())
    number, first = next(numbered, (1, ""))
    second = next(numbered, None)
    by_line = any(suffix in (".jsonl", ".ndjson", ".jsonlines") for suffix in path.suffixes)
    if second is not None and (by_line or _is_json(first)):
        yield from _by_line(path, itertools.chain([(number, first), second], numbered), column, notes)
        return
    rest = itertools.chain([] if second is None else [second], numbered)
    yield from _whole(path, _parse(path, *_joined(path, number, first, rest)), column, notes)


def _joined(path: Path, number: int, first: str, rest: Iterator[tuple[int, str]]) -> tuple[int, str]:
    parts, size, at = [first], len(first), number
    for line_number, line in rest:
        parts.append("\n" * (line_number - at) + line)  # blank lines too, so that errors count right
        size, at = size + len(line), line_number
        if size > MAX_TEXT:
            raise InputError(f"{path}: a JSON text of more than {MAX_TEXT >> 30} GiB: write it as JSON Lines")
    return number, "".join(parts)


def _by_line(path: Path, numbered: Iterator[tuple[int, str]], column: str, notes: list[str]) -> Values:
    chosen = None
    for number, line in numbered:
        value = _parse(path, number, line)
        if isinstance(value, str) and not column:
            yield f"line {number}", value
            continue
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number}: neither an object nor a string: {line.strip()[:40]}")
        if chosen is None:
            chosen = _choose(path, list(value), column, notes)
        try:
            for leaf in leaves(value, _path(column or chosen, value)):
                yield f"line {number}", leaf
        except KeyError as error:
            raise InputError(f"{path}, line {number}: no key {error.args[0]!r}") from error


def _whole(path: Path, value: Any, column: str, notes: list[str]) -> Values:
    """Reads the one value of a JSON text."""
    inside = ""
    keys: tuple[str, ...]
    if isinstance(value, str) and not column:
        value = [value]
    if isinstance(value, dict) and not column:
        if found := usual(value):
            chosen = choose(found, "", str(path))
            notes.append(f"{path}: {described(chosen, list(value))}")
            inner = value[chosen]
            # pandas writes a column as an object from row to value
            yield from _numbered(path, list(inner.values()) if isinstance(inner, dict) else inner)
            return
        inside, value = _rows(path, value)
    if isinstance(value, list) and not column and not any(isinstance(row, dict) for row in value):
        yield from _numbered(path, value)
        return
    if not column:
        chosen = _choose(path, list(_first(path, value)), "", notes, inside)
        value, keys = [_object(path, at, row) for at, row in enumerate(value, 1)], (chosen,)
    else:
        keys = _path(column, value)
    try:
        yield from _numbered(path, list(leaves(value, keys)))
    except KeyError as error:
        known = value if isinstance(value, dict) else _first(path, value)
        choose(list(known), column, str(path))
        raise InputError(f"{path}: an object without the key {error.args[0]!r} of {column!r}") from error


def _rows(path: Path, value: dict) -> tuple[str, Any]:
    """Returns (name and a dot, the list of objects) in an object that holds prompts under one key alone.

    COCO's are under `annotations`. An object whose values are all objects with prompts is the list of them.
    """
    found = {
        key: rows
        for key, rows in value.items()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and usual(rows[0])
    }
    if len(found) == 1:
        ((key, rows),) = found.items()
        return f"{key}.", rows
    if not found and value and all(isinstance(row, dict) and usual(row) for row in value.values()):
        return "", list(value.values())
    keys = ", ".join(ascii(key)[1:-1][:60] for key in list(found or value)[:10])
    raise InputError(
        f"{path}: an object without a list of prompts that stands out among {keys}: {HOW}; * is every key"
    )


def _choose(path: Path, names: list[str], column: str, notes: list[str], inside: str = "") -> str:
    chosen = choose(names, column, str(path))
    if not column:
        notes.append(f"{path}: {described(inside + chosen, [inside + name for name in names])}")
    return chosen


def _first(path: Path, value: Any) -> Mapping[str, Any]:
    rows = value if isinstance(value, list) else [value]
    return next((row for row in rows if isinstance(row, dict)), {})


def _object(path: Path, number: int, row: Any) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{path}, record {number}: {type(row).__name__}, and others are objects")
    return row


def _path(column: str, value: Any) -> tuple[str, ...]:
    return (column,) if isinstance(value, dict) and column in value else tuple(column.split("."))


def _numbered(path: Path, values: Any) -> Values:
    rows = values if isinstance(values, list) else [values]
    for number, row in enumerate(rows, 1):
        for leaf in leaves(row, ()):
            yield f"record {number}", leaf


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number - 1 + error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON that can be read: {error}") from error


def parquet(path: Path, column: str, notes: list[str]) -> Values:
    """Reads a Parquet file, the column of the prompts alone, a few thousand rows at a time.

    Raises InputError for a file that is not whole, and without the [parquet] extra.
    """
    if path.suffix.lower() in PACKED:
        raise InputError(f"{path}: a compressed Parquet file: unpack it first")
    arrow = pyarrow(path)
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            root = choose(names, column, str(path))
            if not column:
                notes.append(f"{path}: {described(root, names)}")
            keys = () if not column or root == column else tuple(column.split(".")[1:])
            for batch in file.iter_batches(columns=[root], batch_size=4096):
                for row in batch.column(0).to_pylist():
                    number += 1
                    for leaf in leaves(row, keys):
                        yield f"row {number}", leaf
    except KeyError as error:
        raise InputError(f"{path}, row {number}: no key {error.args[0]!r} of {column!r}") from error
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a whole Parquet file: {reason}") from error
