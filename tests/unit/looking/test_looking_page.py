"""The page: what data hold is only shown; keys are enough; nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import opened_page

from ultrafuser_mega.cleaning import Benchmarks, BenchmarkText, Rules
from ultrafuser_mega.cleaning.files import Source, clean_files
from ultrafuser_mega.looking import look

EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> & <b>"


def write_rows(folder: Path) -> None:
    """Two classes with topics; a question, a topic and a class that are markup; something that is removed."""
    rows = [
        {
            "question": f"Question {n} of {topic}?",
            "answer": f"Answer {n}." if n else EVIL,
            "topic": ["Wide", topic],
            "class": "text",
        }
        for topic in ("Seas", EVIL)
        for n in range(30)
    ]
    rows += [{"question": EVIL, "answer": "I cannot help.", "class": "text"}]
    rows += [{"question": "How wide is the Atlantic Ocean?", "answer": "Very.", "class": "<i>code</i>"}]
    rows += [{"question": "Sort.", "answer": "sorted()", "topic": ["Lists"], "class": "<i>code</i>"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    item = BenchmarkText(EVIL, f"{EVIL}/1", "How wide is the Atlantic Ocean?")
    clean_files(
        [Source(folder / "rows.jsonl")],
        folder / "clean",
        Rules(without=frozenset({"near_duplicate"})),
        Benchmarks([item]),
        processes=1,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_rows(folder)
    return look([folder / "clean"], folder / "page.html", title=EVIL, picture=(b"\x89PNG", EVIL))


def test_all_that_data_hold_is_escaped_and_nothing_is_loaded(written: Path) -> None:
    text = written.read_text()
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img src=x" not in text
    assert "default-src 'none'" in text and not re.search(r"https?://|@import|url\(|innerHTML", text)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    data = json.loads(found[1])
    assert data["samples"][0]["turns"] == [["Question 0 of Seas?", EVIL]]
    assert [one["name"] for one in data["tree"]["topics"][0]["topics"][0]["topics"]] == ["Seas", EVIL]


def test_counts_of_rules_and_benchmarks_are_on_it(written: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", written.read_text())
    assert re.search(r"refusal\s+1\s+0\s", text) and re.search(r"contaminated\s+0\s+1\s", text)
    assert re.search(r"read\s+61\s+2\s", text) and re.search(r"kept\s+60\s+1\s", text)
    assert "how wide is the atlantic ocean" in text
    assert "61 rows of 2 classes" in text


@pytest.fixture
def page(written: Path) -> Iterator[Any]:
    with opened_page(written.as_uri(), "#samples details") as page:
        yield page
        assert page.title() == "Instruction data"
        assert [url for url in page.loaded if not url.startswith("data:")] == [written.as_uri()]


@pytest.mark.timeout(120)
def test_topics_and_samples_by_keyboard(page: Any) -> None:
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(13, 17, 23)"  # dark, as the reader's system
    assert page.inner_text("#count") == "61 of 61 samples"
    page.keyboard.press("/")
    page.keyboard.type("question 7")
    assert page.inner_text("#count") == "6 of 61 samples"  # 7, 17 and 27 of two topics
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("#samples details[open] .said.reply") == "Answer 7."
    page.fill("#query", "")
    page.focus("#map button[aria-label='Wide: 60 rows']")
    page.keyboard.press("Enter")  # what is in it
    page.focus("#map button[aria-label='Seas: 30 rows']")
    page.keyboard.press("Enter")
    assert page.inner_text("#count") == "30 of 61 samples"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Seas: 30 rows"
    page.keyboard.press("Escape")
    assert page.inner_text("#count") == "60 of 61 samples"
    page.focus("#more")
    page.keyboard.press("Enter")
    assert page.locator("#samples details").count() == 40
    page.keyboard.press("Enter")  # the first new one has the focus
    assert page.locator("#samples details[open]").count() == 1
