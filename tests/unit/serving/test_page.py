"""The page, in a browser: an answer comes in colours, keys are enough, and nothing comes from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from support.browser import opened_page
from support.live_server import LiveServer


def test_the_page_loads_nothing_from_elsewhere(server: LiveServer) -> None:
    with server.open("GET", "/") as response:
        text = response.read().decode()
        assert response.status == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"https?://|@import|url\(", text)
    assert "__COLORS__" not in text and "#0072B2" in text
    assert "innerHTML" not in files("ultrafuser_mega.serving").joinpath("page.html").read_text()


@pytest.fixture
def page(server: LiveServer) -> Iterator[Any]:
    with opened_page(server.url, "#legend .chip") as page:
        yield page


def test_a_conversation_by_keyboard(page: Any) -> None:
    assert page.inner_text("#model") == "toy"
    page.keyboard.type("Which city")  # the field has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("is the largest?")
    page.keyboard.press("Enter")
    page.wait_for_selector("section.assistant details")
    assert page.inner_text("section.user") == "Which city\nis the largest?"
    assert page.inner_text(".answer") == "London is the largest city."
    leaders = page.eval_on_selector_all(".answer span", "spans => spans.map(span => span.dataset.leader)")
    assert set(leaders) == {"text", "code", "math"}
    assert "stop" in page.inner_text("section.assistant > .note") and "tokens/s" in page.inner_text(".note")
    page.focus(".answer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "70 %" in page.inner_text("#tip") and '"on"' in page.inner_text("#tip")
    page.focus("details.note summary")
    page.keyboard.press("Enter")
    assert "[INST] Which city\nis the largest? [/INST]" in page.inner_text(".prompts")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(13, 17, 23)"  # dark, as the reader's system


def test_an_error_is_shown_and_the_conversation_goes_on(page: Any) -> None:
    page.fill("#text", "so " * 400)
    page.keyboard.press("Enter")
    page.wait_for_selector("section.error")
    assert "maximum context length is 256 tokens" in page.inner_text("section.error")
    page.fill("#text", "<b>Which</b> city?")
    page.keyboard.press("Enter")
    page.wait_for_selector("section.assistant details")
    assert page.inner_text("section.user:nth-of-type(3)") == "<b>Which</b> city?"
