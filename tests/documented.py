"""The code blocks of the pages, as a reader would copy them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def block(page: str, name: str) -> str:
    """Returns the code between `<!-- name -->` and `<!-- end -->` of a page, without its fence."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", text, re.DOTALL)
    return found
