"""The ledger: what is marked, kept, lost, and what a damaged file says."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.synthesis.ledger import FILE, Ledger, Lost
from ultrafuser_mega.synthesis.requests import GOOD, MALFORMED, Reply, Request


def request(text: str = "x", number: str = "0.0", **others: str) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    told = {"of": "text", "step": "responses", "model": "m", "version": "1", **others}
    return Request(body=body, number=number, **told)


def test_a_key_changes_with_all_that_a_reply_depends_on() -> None:
    variants = [request(), request("y"), request(number="0.1"), request(of="code")]
    variants += [request(step="related"), request(version="2")]
    assert len({one.key for one in variants}) == len(variants)
    assert request().key == request().key


def test_a_reply_takes_the_place_of_its_mark_and_is_found_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    reply = Reply("hello", None, "stop", 3, 2, True, "m-1", 0.5)
    ledger.sending(request(), 100, 0.5)
    ledger.keep(request(), reply, 0.25, GOOD)
    assert ledger.find(request().key) == reply
    ledger.close()
    again = Ledger(tmp_path)
    assert again.find(request().key) == reply and again.found.requests == 0 == again.lost().requests
    (total,) = again.totals()
    assert (total.of, total.step, total.verdict, total.replies, total.cost) == ("text", "responses", GOOD, 1, 0.25)
    again.close()


def test_what_was_under_way_at_the_end_counts_as_paid_for(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.sending(request(), 100, 0.5)
    ledger.sending(request("y"), 10, 0.25)
    ledger.unpaid(request("y").key)  # turned away
    ledger.close()
    again = Ledger(tmp_path)
    assert again.found == again.lost() == Lost(1, 100, 0.5)
    again.sending(request(), 100, 0.5)  # asked again
    again.keep(request(), Reply("late"), 0.1, MALFORMED)
    again.close()
    last = Ledger(tmp_path)
    assert last.found == Lost(0, 0, 0.0) and last.lost() == Lost(1, 100, 0.5)
    last.close()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_ledger_of_another_version_is_told_and_left_as_it_is(read_only: bool, tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("pragma user_version=7")
    db.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InputError, match=r"ledger\.sqlite: written by another version of this program \(form 7, this"):
        Ledger(tmp_path, read_only=read_only)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_ledger_whose_run_ended_before_it_had_tables_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    ledger = Ledger(tmp_path, read_only=True)
    assert ledger.totals() == [] and ledger.lost().requests == 0
    ledger.close()
    assert (tmp_path / FILE).read_bytes() == b""


def test_batches_are_in_the_order_in_which_they_were_made_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    for name, now in (("b", 5e9), ("c", 10.0), ("a", 1e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        ledger.plan_batch(name, "m", [])
    assert [name for name, _ in ledger.open_batches("m")] == ["b", "c", "a"]
    ledger.close()


def test_a_file_that_is_no_ledger_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(InputError, match=r"ledger.sqlite: is damaged, or no ledger; .* \(file is not a database\)"):
        Ledger(tmp_path)


def test_a_ledger_that_cannot_be_written_ends_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.keep(request(), Reply("hello"), 0.25, GOOD)
    ledger.close()
    reader = Ledger(tmp_path, read_only=True)
    with pytest.raises(InputError, match=r"ledger.sqlite: attempt to write a readonly database; .* goes on once"):
        reader.sending(request("y"), 1, 0.0)
    reader.close()
    again = Ledger(tmp_path)
    assert again.find(request().key) is not None
    again.close()


def test_a_ledger_that_is_damaged_somewhere_ends_in_one_line_whatever_is_asked(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(40):
        ledger.keep(request(number=str(number)), Reply("x" * 20_000), 0.0, GOOD)
    ledger.close()
    path = tmp_path / FILE
    content = bytearray(path.read_bytes())
    for page in range(40, len(content) // 4096):  # behind the tables' own
        content[page * 4096 : page * 4096 + 4] = b"\xff" * 4
    path.write_bytes(content)
    ledger = Ledger(tmp_path)
    with pytest.raises(InputError, match=r"ledger.sqlite: is damaged, or no ledger; put back a copy") as caught:
        for number in range(40):
            ledger.find(request(number=str(number)).key)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is damaged"):
        list(ledger.rows("select text from call"))
    ledger.close()
