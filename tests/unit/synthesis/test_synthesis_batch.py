"""Batches: nothing is paid twice, whatever ends the run in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.counting_endpoint import CountingEndpoint
from support.small_synthesis import small_config

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.synthesis import batch
from ultrafuser_mega.synthesis.budget import LimitReachedError
from ultrafuser_mega.synthesis.client import NO_ANSWER, Asker
from ultrafuser_mega.synthesis.forms import any_text
from ultrafuser_mega.synthesis.ledger import Ledger
from ultrafuser_mega.synthesis.progress import Progress
from ultrafuser_mega.synthesis.requests import Answer, Call

BATCHED = {"model": "m", "max_tokens": 64, "batch": True, "retries": 1}


def ask(folder: Path, endpoint: CountingEndpoint, number: int, **keys: Any) -> tuple[list[Answer], Asker]:
    async def play() -> tuple[list[Answer], Asker]:
        ledger = Ledger(folder)
        asker = Asker(
            small_config(endpoint.url, steps__responses=BATCHED, **keys), ledger, Progress(Console(quiet=True))
        )
        try:
            messages = [({"role": "user", "content": f"question {place}"},) for place in range(number)]
            return await asker.ask_all([Call("text", "responses", one, any_text()) for one in messages]), asker
        finally:
            await asker.close()
            ledger.close()

    return asyncio.run(asyncio.wait_for(play(), 60))


def test_all_are_answered_for_half_the_price_and_a_second_run_asks_nothing(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    answers, asker = ask(tmp_path, endpoint, 20)
    assert all(answer.value for answer in answers) and sum(endpoint.answered.values()) == 20
    spent = asker.budget.spent
    assert spent.requests == 20 and spent.tokens == endpoint.read + endpoint.written
    assert spent.money == pytest.approx((endpoint.read + 10 * endpoint.written) / 2e6)
    again, _ = ask(tmp_path, endpoint, 20)
    assert again == answers and len(endpoint.batches) == 1


def test_batches_hold_no_more_than_the_endpoint_takes(
    endpoint: CountingEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_MOST_REQUESTS", 8)
    ask(tmp_path, endpoint, 20)
    sizes = [len(endpoint.files[made["input_file_id"]].splitlines()) for made in endpoint.batches.values()]
    assert sizes == [8, 8, 4]
    monkeypatch.setattr(batch, "_MOST_BYTES", 1000)
    ask(tmp_path, endpoint, 40)
    assert all(len(endpoint.files[made["input_file_id"]]) <= 1000 for made in list(endpoint.batches.values())[3:])
    assert max(endpoint.answered.values()) == 1


def test_what_a_batch_has_no_reply_to_goes_into_another(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    endpoint.batch_loses = lambda key: len(endpoint.batches) == 1 and key < "8"
    answers, asker = ask(tmp_path, endpoint, 20)
    assert all(answer.value for answer in answers) and len(endpoint.batches) == 2
    assert max(endpoint.answered.values()) == 1 and asker.budget.spent.requests == 20


def test_requests_that_no_batch_answers_are_told_and_not_counted(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    endpoint.batch_loses = lambda key: True
    answers, asker = ask(tmp_path, endpoint, 3)
    assert [answer.faults for answer in answers] == [(NO_ANSWER,)] * 3
    assert asker.budget.spent.requests == 0 and len(endpoint.batches) < 4


@pytest.mark.parametrize("known", [True, False])
def test_a_batch_that_was_made_when_the_run_ended_is_waited_for(
    known: bool, endpoint: CountingEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it: behind the making of the batch, before or after its id was written down."""

    class KilledError(BaseException):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        if known:
            patch.setattr(batch._Batches, "_finish", killed)
        else:
            patch.setattr(Ledger, "name_batch", killed)
        with pytest.raises(KilledError):
            ask(tmp_path, endpoint, 10)
    assert len(endpoint.batches) == 1
    answers, asker = ask(tmp_path, endpoint, 10)
    assert all(answer.value for answer in answers) and len(endpoint.batches) == 1
    assert sum(endpoint.answered.values()) == 10 == asker.budget.spent.requests


def test_a_limit_holds_for_batches(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    with pytest.raises(LimitReachedError, match=r"limit.requests=12 is reached: 12 are used"):
        ask(tmp_path, endpoint, 20, limit={"requests": 12})
    assert sum(endpoint.answered.values()) == 12
    answers, _ = ask(tmp_path, endpoint, 20)
    assert len(answers) == 20 and max(endpoint.answered.values()) == 1


def test_an_endpoint_without_batches_is_told_in_one_line(
    endpoint: CountingEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: tuple[int, dict[str, str], str] = (404, {}, json.dumps({"error": {"message": "no such path"}}))
    monkeypatch.setattr(endpoint, "_upload", lambda content: error)
    with pytest.raises(InputError, match=r"^endpoints.here: batches: Error code: 404 .*no such path.*; the same"):
        ask(tmp_path, endpoint, 3)


def test_lines_of_a_file_are_whole_however_it_comes_in_parts() -> None:
    async def read(parts: list[bytes]) -> list[bytes]:
        async def come() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        return [line async for line in batch._lines(come()) if line]

    lines = [b"a" * 5, "b\u2028\r\x85".encode(), b"c" * 9]
    whole = b"\n".join(lines) + b"\n"
    for size in range(1, len(whole) + 1):
        assert asyncio.run(read([whole[at : at + size] for at in range(0, len(whole), size)])) == lines
    with pytest.raises(ValueError, match="a line of more than 64 MiB in what a batch came to"):
        asyncio.run(read([bytes(2**22)] * 17))


def test_a_reply_may_hold_what_ends_lines_elsewhere(
    endpoint: CountingEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "one\u2028two\x85three\x0cfour"
    monkeypatch.setattr("support.counting_endpoint.said", lambda body: text)
    monkeypatch.setattr(  # as endpoints write it that escape only what JSON has to
        "support.counting_endpoint.json.dumps",
        lambda value, dumps=json.dumps, **how: dumps(value, **{**how, "ensure_ascii": False}),
    )
    answers, asker = ask(tmp_path, endpoint, 3)
    assert all(answer.value for answer in answers) and len(endpoint.batches) == 1
    assert asker.budget.spent.requests == 3
