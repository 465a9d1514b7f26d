"""A real browser for the pages, where one is installed."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@contextlib.contextmanager
def opened(address: str) -> Iterator:
    """Opens an address; in the end there was no error in the page, and no other machine was asked for anything."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, wrong, asked = browser.new_page(), [], []
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        assert not wrong
        assert asked and all(one.startswith((address, "data:", "blob:")) for one in asked)
        browser.close()
