"""What a file of prompts is: plain text, a table, JSON or Parquet, told by its first bytes and then by its name.

Whatever else it is, is refused: a format that is read as plain text gives prompts such as `[`.
"""

import codecs
import csv
import enum
import re
from pathlib import Path

from sbv2_jax.data.columns import usual
from sbv2_jax.data.streams import PACKED, head_of
from sbv2_jax.errors import InputError

DELIMITERS = ",\t;|"


class Kind(enum.Enum):
    """The kinds of files that prompts are read from."""

    TEXT = "text, one prompt a line"
    TABLE = "CSV or TSV"
    JSON = "JSON or JSON Lines"
    PARQUET = "Parquet"


_BY_SUFFIX = {
    ".csv": Kind.TABLE, ".tsv": Kind.TABLE, ".tab": Kind.TABLE,
    ".json": Kind.JSON, ".jsonl": Kind.JSON, ".ndjson": Kind.JSON, ".jsonlines": Kind.JSON,
    ".parquet": Kind.PARQUET, ".pq": Kind.PARQUET,
}  # fmt: skip
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive (or XLSX, DOCX, NPZ)", b"%PDF-": "a PDF", b"{\\rtf": "an RTF document",
    b"SQLite format 3": "an SQLite database", b"\x89HDF": "an HDF5 file", b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file", b"ORC": "an ORC file", b"\x93NUMPY": "a NumPy array", b"\x7fELF": "a program",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture", b"RIFF": "a picture or sound",
    b"\xd0\xcf\x11\xe0": "an old Office file", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive",
    b"<?xml": "XML", b"<!doctype": "HTML", b"<html": "HTML", b"version https://git-lfs": "a Git LFS pointer",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
}  # fmt: skip
_OTHERS = (
    ".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm", ".md", ".rst", ".tex", ".py", ".ipynb", ".sql",
    ".srt", ".vtt", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".xls", ".ods", ".docx", ".doc", ".rtf", ".pdf",
    ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".h5", ".hdf5", ".db", ".sqlite", ".tar", ".zip", ".7z",
    ".tfrecord", ".safetensors", ".png", ".jpg", ".jpeg", ".webp",
)  # fmt: skip
# `{"` and `["`, `[{`: no prompt begins so, and "(a:1.2)", "[a|b]", "[[a]]", "{a|b}", "{{a}}" and "<lora:a:1>" do.
_JSON = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*"|\[\s*["{])')


def kind_of(path: Path) -> Kind:
    """Returns the kind of a prompt file, unpacked where it is compressed.

    Raises InputError for what is none of them, naming it where it is known, and as `streams.chunks` does.
    """
    head = head_of(path)
    if head.startswith(b"PAR1"):
        return Kind.PARQUET
    if (found := _foreign(head)) is not None:
        raise _refusal(path, found)
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    suffix = Path(name).suffix
    if suffix in _OTHERS:
        raise _refusal(path, f"a {suffix} file")
    if _JSON.match(head):
        return Kind.JSON
    return _BY_SUFFIX.get(suffix, Kind.TEXT)


def looks_like_table(head: str) -> tuple[str, ...]:
    """Returns the columns of a text that is a table by another name, such as `image,caption`; else none.

    Its first line is names without spaces, one of them as prompts' columns are named, and the next lines have as
    many fields.
    """
    rows = [line for line in head.splitlines()[:21] if line.strip()]
    for delimiter in DELIMITERS:
        names = rows[0].split(delimiter) if rows else []
        plain = all(re.fullmatch(r'"?\w[\w.#-]*"?', name) for name in names)
        if len(names) < 2 or len(rows) < 2 or not plain or not usual(names):
            continue
        try:
            fields = {len(row) for row in csv.reader(rows, delimiter=delimiter)}
        except csv.Error:
            continue
        if fields == {len(names)}:
            return tuple(names)
    return ()


def _foreign(head: bytes) -> str | None:
    for magic, what in _MAGIC.items():
        if head[:32].lower().lstrip().startswith(magic.lower()):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return "a safetensors file"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None  # text, of which the line is told that is not UTF-8
    controls = sum(byte < 9 or 13 < byte < 32 for byte in head[:4096])
    return "a binary file" if controls > 0.3 * len(head[:4096]) else None


def _refusal(path: Path, what: str) -> InputError:
    kinds = ", ".join(kind.value for kind in Kind)
    return InputError(f"{path} is {what}, which is not read as prompts: give {kinds}")
