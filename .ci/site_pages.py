"""The pages of the site that do not lie in docs/ (a hook of mkdocs): README.md and what pages link to.

Pages are written for the repository, where links lead to files. Here they are led to where these files are in the site.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
PLACES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def place(name: str) -> str:
    """Returns where a file of the repository is in the site: code is a page too."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return PLACES.get(name) or f"source/{name}" + (".md" if name.endswith(".py") else "")


def linked(name: str, text: str) -> list[str]:
    """Returns the files of the repository that a page links to."""
    found = (os.path.normpath(Path(name).parent / link[1]) for link in LINK.finditer(text))
    return [one for one in found if (ROOT / one).is_file()]


def moved(name: str, text: str) -> str:
    """Returns a page's text with its links as they are in the site; one that leads nowhere stays, and is reported."""

    def new(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(name).parent / link[1])
        if not (ROOT / target).is_file():
            return link[0]
        return f"]({os.path.relpath(place(target), Path(place(name)).parent)}{link[2] or ''})"

    return LINK.sub(new, text)


def content(name: str) -> str | bytes:
    if name.endswith(".md"):
        return moved(name, (ROOT / name).read_text(encoding="utf-8"))
    if name.endswith(".py"):
        # Found by a link, not by the search, where code would hide the pages.
        head = f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n"
        return f"{head}````python\n{(ROOT / name).read_text(encoding='utf-8')}````\n"
    return (ROOT / name).read_bytes()


def on_files(files: Any, *, config: Any) -> Any:
    waiting, known = [*PLACES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())], set()
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        if not name.startswith("docs/"):
            inclusion = InclusionLevel.INCLUDED if name in PLACES else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(name), content=content(name), inclusion=inclusion))
        if name.endswith(".md"):
            waiting += linked(name, (ROOT / name).read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    return moved(f"docs/{page.file.src_uri}", markdown) if page.file.abs_src_path else markdown
