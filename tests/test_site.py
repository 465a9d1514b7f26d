"""The pages as a site: built strictly, each page in its place, links that lead somewhere, nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from browser import needs_browser, opened

pytest.importorskip("material", reason='the site needs pip install -e ".[docs]"')

ROOT = Path(__file__).parents[1]
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


class Page(HTMLParser):
    """What a page links to, what a browser fetches for it, its headings' addresses, and the text of its paragraphs."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.fetched, self.anchors, self.text = path, [], [], set(), []
        self._open: Counter[str] = Counter()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self._open[tag] += 1
        self.anchors.add(values.get("id") or values.get("name"))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.fetched += [values[name] for one, name in FETCHED if one == tag and values.get(name)]

    def handle_endtag(self, tag):
        self._open[tag] -= 1

    def handle_data(self, data):
        if self._open["p"] and not self._open["code"]:
            self.text.append(data)


class Quiet(SimpleHTTPRequestHandler):
    """A server that does not print what it was asked for."""

    def log_message(self, *arguments):
        pass


def build(into: Path, root: Path = ROOT) -> subprocess.CompletedProcess:
    # Not --quiet: what is not shown is not counted by --strict either.
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={into}"],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, Page]:
    """The pages of the built site by their addresses."""
    directory = tmp_path_factory.mktemp("site")
    done = build(directory)
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(directory)): Page(path) for path in directory.rglob("*.html")}


@pytest.fixture(scope="module")
def address(site):
    """The site's address on this machine."""
    handler = partial(Quiet, directory=str(site["index.html"].path.parent))
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def test_every_page_has_one_place_in_the_navigation(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing", "changes"}
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.findall(r"(\w+)\.md$", config.partition("\nnav:")[2].partition("\ntheme:")[0], re.MULTILINE)
    assert Counter(nav) == Counter(pages)
    assert {f"{page}.html" for page in pages} <= site.keys()


def test_links_of_the_site_lead_to_pages_and_headings(site):
    wrong = []
    for name, page in site.items():
        if name == "404.html":  # its links are from the root of a server
            continue
        for link in {*page.links, *page.fetched}:
            target, anchor = urldefrag(unquote(link))
            if ":" in target:
                continue
            path = Path(os.path.normpath(page.path.parent / target)) if target else page.path
            headings = next((one.anchors for one in site.values() if one.path == path), set())
            if not path.exists() or (anchor and anchor not in headings):
                wrong.append((name, link))
    assert not wrong
    # Code that a page links to is a page too.
    assert "sbv2_jaxdistillplayerpy" in site["source/sbv2_jax/distill/player.py.html"].anchors


def test_nothing_is_fetched_from_elsewhere(site):
    assert not [(name, one) for name, page in site.items() for one in page.fetched if "//" in one]
    root = site["index.html"].path.parent
    for sheet in root.rglob("*.css"):
        assert not re.findall(
            r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")
        ), sheet


def test_what_the_repository_shows_as_lists_and_tables_is_not_run_together(site):
    """Markdown of a site wants an empty line before them, that of the repository's host does not."""
    wrong = [
        (name, line)
        for name, page in site.items()
        for line in "".join(page.text).splitlines()
        if re.match(r"(- |\* |\d+\. |\||```|<!--)", line)
    ]
    assert not wrong


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(
        "# Start\n\n[a](docs/training.md#no-such-heading)\n\n[b](docs/nowhere.md)\n"
    )
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode == 1
    assert "'training.md#no-such-heading'" in done.stderr and "'docs/nowhere.md'" in done.stderr


@needs_browser
def test_the_search_finds_a_page_and_asks_no_other_machine(address):
    with opened(address) as page:
        # As a person does: what is filled in before the page listens is never searched for.
        page.click("input[name=query]")
        page.locator("input[name=query]").press_sequentially("negative prompt")
        page.locator(".md-search-result__link[href*='after_training.html']").first.wait_for()


@needs_browser
@pytest.mark.slow
def test_no_page_is_wider_than_a_telephone(site, address):
    """Wide tables and code scroll by themselves."""
    wide = {}
    with opened(address) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        for name in sorted(site):
            page.goto(address + name)
            if (width := page.evaluate("document.documentElement.scrollWidth")) > 390:
                wide[name] = width
    assert not wide
