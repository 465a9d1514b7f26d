"""The code blocks of the pages, as a reader would copy them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def block(page: str, name: str) -> str:
    """Returns the code between `<!-- name -->` and `<!-- end -->` of a page, without its fence."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", text, re.DOTALL)
    return found


def shell_lines(page: Path) -> list[str]:
    """Every line of a page's shell blocks that is not a comment; what goes on in the next line is one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def commands(line: str) -> list[str]:
    """The commands of this package's programs in a line of shell."""
    parts = re.split(r"&&|--command='|--docker-image=\S+", line)
    found = [part for part in parts if re.search(r"python launch/\w+\.py|\bsbv2-\w+", part)]
    return [re.sub(r"^.*?(?=python launch/|sbv2-)", "", part).rstrip("' ") for part in found]
