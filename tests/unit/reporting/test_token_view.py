"""The token page: every token in its place with its weights, nothing loaded from outside, nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.palette import COLORS
from ultrafuser_mega.reporting.token_view import TokenSample, token_texts, write_token_view

_HOSTILE = "<script>alert('x')</script> & \"quotes\""


def _sample(**changes: Any) -> TokenSample:
    fields: dict[str, Any] = {
        "class_name": "math",
        "prompt": "What is 1 < 2?",
        "tokens": ["It", " is", "\n", "</div>"],
        "weights": np.array([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.7, 0.3]]),  # (4, 2)
        "losses": np.array([0.5, 1.5, 0.0, 2.0]),  # (4,)
    }
    return TokenSample(**(fields | changes))


class _Page(HTMLParser):
    """Collects the response's token spans, the text outside of style, and what the browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tokens: list[dict[str, str]] = []
        self.text = ""
        self.loads: list[str | None] = []
        self.open: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: Any, attributes: Any) -> None:
        attributes = dict(attributes)
        if tag not in ("meta", "br"):
            self.open.append((tag, attributes.get("class")))
        self.loads += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)
        if tag == "span" and ("div", "response") in self.open:
            self.tokens.append({**attributes, "text": ""})

    def handle_endtag(self, tag: Any) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: Any) -> None:
        if ("style", None) in self.open:
            return
        self.text += data
        if ("div", "response") in self.open:
            self.tokens[-1]["text"] += data


def _page(tmp_path: Path, *samples: Any, specialists: Any = ("text", "math"), **options: Any) -> _Page:
    path = write_token_view(tmp_path / "plots" / "tokens.html", samples, specialists, **options)
    return _Page(path.read_text(encoding="utf-8"))


def test_every_token_is_coloured_by_its_leader_and_tells_weights_and_loss(tmp_path: Path) -> None:
    page = _page(tmp_path, _sample())
    assert [token["text"] for token in page.tokens] == ["It", " is", "\u21b5\n", "</div>"]
    assert [token["class"] for token in page.tokens] == ["s1", "s0", "s0", "s0"]
    assert page.tokens[0]["title"] == "text 0.20  math 0.80\nloss 0.50 nats"


def test_opacity_grows_with_the_leading_weight(tmp_path: Path) -> None:
    page = _page(tmp_path, _sample())
    opacity = [float(token["style"].removeprefix("--a:")) for token in page.tokens]
    weight = [0.8, 0.5, 1.0, 0.7]
    assert np.argsort(opacity).tolist() == np.argsort(weight).tolist()


def test_all_text_is_escaped(tmp_path: Path) -> None:
    sample = _sample(class_name=_HOSTILE, prompt=_HOSTILE, tokens=[_HOSTILE, "a", "b", "c"])
    page = _page(tmp_path, sample, specialists=(_HOSTILE, "math"), title=_HOSTILE)
    assert page.loads == [] and page.open == []
    assert page.tokens[0]["text"] == _HOSTILE
    assert page.text.count(_HOSTILE) == 7  # title, heading, legend, class, average bar, prompt, token


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    path = write_token_view(tmp_path / "tokens.html", [_sample()], ["text", "math"])
    html = path.read_text(encoding="utf-8")
    assert _Page(html).loads == []
    assert not re.search(r"https?:|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html


def test_a_sample_shows_its_average_weights_and_mean_loss(tmp_path: Path) -> None:
    page = _page(tmp_path, _sample())
    assert "text 0.60math 0.40" in page.text
    assert "4 response tokens" in page.text and "mean loss 1.000 nats" in page.text


def test_a_long_prompt_is_folded_but_whole(tmp_path: Path) -> None:
    prompt = " ".join(f"word{index}" for index in range(200))
    assert prompt in _page(tmp_path, _sample(prompt=prompt)).text


def test_a_token_without_text_of_its_own_is_still_visible(tmp_path: Path) -> None:
    page = _page(tmp_path, _sample(tokens=["", "\u00e9", "x", "y"]))
    assert page.tokens[0]["text"].strip()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ["a"]},
        {"weights": np.ones((4, 3))},
        {"losses": np.ones(3)},
        {"tokens": [], "weights": np.ones((0, 2))},
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_sample(tmp_path: Path, changes: Any) -> None:
    with pytest.raises(InputError, match="sample 1 has"):
        write_token_view(tmp_path / "tokens.html", [_sample(), _sample(**changes)], ["text", "math"])


def test_no_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sample to show"):
        write_token_view(tmp_path / "tokens.html", [], ["text"])


def _decode_bytes(ids: list[int]) -> str:
    """A tokenizer whose tokens are the bytes of UTF-8, and which like SentencePiece drops a leading space."""
    return bytes(ids).decode("utf-8", errors="replace").removeprefix(" ")


def test_token_texts_join_to_the_decoded_text_even_where_a_character_spans_tokens() -> None:
    text = "na\u00efve caf\u00e9 \u4f60\u597d end"
    texts = token_texts(list(text.encode()), _decode_bytes)
    assert len(texts) == len(text.encode())
    assert "".join(texts) == text
    assert texts[2:4] == ["", "\u00ef"]


def test_token_texts_keep_an_unfinished_character_at_the_end() -> None:
    assert token_texts(list("ab\u00e9".encode()[:-1]), _decode_bytes) == ["a", "b", "\ufffd"]


def _contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours, 0..255."""

    def luminance(color: tuple[float, ...]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_on_the_strongest_colour_is_readable_in_light_and_dark_mode(tmp_path: Path) -> None:
    html = write_token_view(tmp_path / "tokens.html", [_sample()], ["text", "math"]).read_text(encoding="utf-8")
    strongest = float(re.findall(r"--strong: ([\d.]+);", html)[0])

    def rgb(color: str) -> tuple[int, ...]:
        return tuple(int(color[start : start + 2], 16) for start in (1, 3, 5))

    modes = re.findall(r"--card: (#\w{6}); --ink: (#\w{6});", html)
    assert len(modes) == 2
    for card, ink in modes:
        for color in COLORS:
            mixed = tuple(strongest * c + (1 - strongest) * b for c, b in zip(rgb(color), rgb(card), strict=True))
            assert _contrast(mixed, rgb(ink)) >= 4.5, (card, color)  # WCAG 2 AA for normal text
