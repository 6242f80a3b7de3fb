"""Pages in a headless Chromium, where there is one and playwright to drive it; else what needs it is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def opened_page(address: str, ready: str) -> Iterator[Any]:
    """The page at ``address``, in the dark, once the element ``ready`` is on it; no script of it may fail.

    ``page.loaded`` has the addresses of all that it asked for.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark")
        wrong: list[str] = []
        page.loaded = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: page.loaded.append(request.url))
        page.goto(address)
        page.wait_for_selector(ready)
        yield page
        assert not wrong
        browser.close()
