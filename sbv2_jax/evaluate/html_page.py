"""An HTML page that needs no other file: its frame, its tables, and pictures that are written into it."""

import base64
import html
from collections.abc import Iterable, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: right; vertical-align: top }
td, th { white-space: nowrap } td:first-child, th:first-child { text-align: left; white-space: normal }
summary { cursor: pointer; margin: .5em 0 }
small { color: #777 } img { max-width: 100% } pre, code { background: #f4f4f4; padding: .1em .3em; overflow-x: auto }
.best { font-weight: 600 } .scroll { overflow-x: auto }
"""


def html_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """Returns a page of HTML parts, readable on a phone too; `style` is CSS beside the common one."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Returns a table of cells that are HTML already; a wide one is scrolled by itself."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def inline(data: bytes, kind: str) -> str:
    """Returns the address of a picture that lies in the page itself; `kind` is its media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
