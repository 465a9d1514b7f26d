"""Runs the Python code of a document as it is written there: `snippets.py README.md WRITTEN=PATH ...`.

Every block is a program of its own; in it WRITTEN, such as `runs/full/export`, is replaced by PATH.
"""

import re
import sys
from pathlib import Path


def snippets(text: str) -> list[str]:
    """Returns the contents of the blocks that are fenced as python."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def main(document: str, *replacements: str) -> None:
    found = snippets(Path(document).read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"{document} has no Python code")
    for code in found:
        for replacement in replacements:
            written, path = replacement.split("=", 1)
            if written not in code:
                sys.exit(f"{document} has Python code without {written}:\n{code}")
            code = code.replace(written, path)
        print(code)
        exec(compile(code, document, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
