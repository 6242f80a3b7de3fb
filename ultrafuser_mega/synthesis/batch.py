"""Requests by an endpoint's batch interface: half the price, within a day, and nothing is paid twice.

A batch is written down, with the keys of its requests, before it is made, and its id before it is waited for; its name
travels in its metadata, so one that was made just when the run ended is found again among the endpoint's. Every request
bears its key as ``custom_id``. What a finished batch has no reply to goes into another one.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.openai_client import one_line
from ultrafuser_mega.synthesis.budget import Amount, LimitReachedError
from ultrafuser_mega.synthesis.client import NO_ANSWER, Asker, read_reply
from ultrafuser_mega.synthesis.config import Step
from ultrafuser_mega.synthesis.requests import GOOD, Answer, Call, Reply, Request, reply_of

_MOST_REQUESTS, _MOST_BYTES = 50_000, 200_000_000  # of a batch, as OpenAI has it
_MOST_BYTES_OF_A_LINE = 64 * 2**20  # of what it came to
_OVER = ("completed", "failed", "expired", "cancelled")
_PATH = "/v1/chat/completions"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 60.0
_LISTED = 100  # batches of the endpoint that are looked through for one of ours
_HOPELESS = 3  # batches in a row that answer nothing


async def ask_in_batches(asker: Asker, calls: Sequence[Call], step: Step) -> list[Answer]:
    """An answer to every call, as :meth:`Asker.ask_all` gives them."""
    answers: list[Answer | None] = [None] * len(calls)
    faults: list[list[str]] = [[] for _ in calls]
    last: list[Reply | None] = [None] * len(calls)
    waiting = list(range(len(calls)))
    for attempt in range(step.retries + 1):
        requests = {place: await asker.request(calls[place], step, attempt, last[place]) for place in waiting}
        missing = {request.key: (request, calls[place]) for place, request in requests.items()}
        missing = {key: pair for key, pair in missing.items() if asker.ledger.find(key) is None}
        await _Batches(asker, step.model).answer(missing)
        again = []
        for place, request in requests.items():
            call = calls[place]
            last[place] = reply = asker.ledger.find(request.key)
            if reply is None:
                answers[place] = Answer(None, None, (*faults[place], NO_ANSWER))
                continue
            if request.key not in missing:
                asker.progress.kept(call.of, call.step)
            value, fault = read_reply(call, reply)
            if fault is None:
                answers[place] = Answer(value, request.key, tuple(faults[place]))
                continue
            faults[place].append(fault)
            answers[place] = Answer(None, request.key, tuple(faults[place]))
            again.append(place)
        waiting = again
    for call in calls:
        asker.progress.ended(call.of, call.step)
    return [answer for answer in answers if answer is not None]


class _Batches:
    """The batches of one model."""

    def __init__(self, asker: Asker, model: str) -> None:
        self._asker, self._model = asker, model
        self._ledger = asker.ledger
        self._client = asker.client(model)
        self._endpoint = asker.config.models[model].endpoint

    async def answer(self, missing: dict[str, tuple[Request, Call]]) -> None:
        """Have these, by key, answered into the ledger, as far as the endpoint answers them."""
        in_vain = 0
        while missing and in_vain < _HOPELESS:
            before = len(missing)
            for name, identity in self._ledger.open_batches(self._model):
                if missing.keys() & self._ledger.batched(name).keys():
                    await self._finish(name, identity, missing)
            missing = {key: pair for key, pair in missing.items() if self._ledger.find(key) is None}
            in_vain = 0 if len(missing) < before else in_vain + 1
            if missing and in_vain < _HOPELESS:
                await self._make(list(missing.values()))

    async def _make(self, pairs: list[tuple[Request, Call]]) -> None:
        """Batches of these; as many as the budget has room for."""
        budget, place = self._asker.budget, 0
        while place < len(pairs):
            if self._asker.stop is not None:
                raise self._asker.stop
            lines: list[bytes] = []
            planned: list[tuple[str, int, float]] = []
            size = 0
            while place < len(pairs) and len(lines) < _MOST_REQUESTS:
                request = pairs[place][0]
                line = _line(request)
                most = self._asker.most(request, batch=True)
                if size + len(line) > _MOST_BYTES or not budget.try_reserve(most):
                    break
                lines.append(line)
                size += len(line)
                planned.append((request.key, most.tokens, most.money))
                place += 1
            if not lines:
                try:
                    await budget.reserve(self._asker.most(pairs[place][0], batch=True))
                except LimitReachedError as error:
                    open_now = self._ledger.open_batches(self._model)
                    if open_now:  # they may leave room
                        return
                    raise self._asker.end(error) from None
                await budget.settle(self._asker.most(pairs[place][0], batch=True), Amount())
                continue
            await self._submit(planned, b"".join(lines))

    async def _submit(self, planned: list[tuple[str, int, float]], content: bytes) -> None:
        name = uuid.uuid4().hex
        # From here on the ledger counts them as under way: what was set aside in the budget is counted as spent.
        for _, tokens, money in planned:
            await self._asker.budget.settle(Amount(1, tokens, money), Amount(1, tokens, money))
        self._ledger.plan_batch(name, self._model, planned)
        try:
            file = await self._client.files.create(file=(f"{name}.jsonl", content), purpose="batch")
            made = await self._client.batches.create(
                input_file_id=file.id, endpoint=_PATH, completion_window="24h", metadata={"ultrafuser": name}
            )
        except Exception as error:
            raise self._refused(error) from None
        self._ledger.name_batch(name, made.id)

    async def _finish(self, name: str, identity: str | None, missing: dict[str, tuple[Request, Call]]) -> None:
        """Wait for a batch and take its replies."""
        wait = _FIRST_WAIT_S
        try:
            if identity is None:
                identity = await self._made_as(name)
                if identity is None:
                    await self._free(name, "never made")
                    return
                self._ledger.name_batch(name, identity)
            while (batch := await self._client.batches.retrieve(identity)).status not in _OVER:
                if self._asker.stop is not None:
                    raise self._asker.stop
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            for file in (batch.output_file_id, batch.error_file_id):
                if file:
                    async with self._client.files.with_streaming_response.content(file) as content:
                        async for line in _lines(content.iter_bytes()):
                            await self._take(line.decode(errors="replace"), name, missing)
        except Exception as error:
            if error is self._asker.stop:
                raise
            raise self._refused(error) from None
        await self._free(name, batch.status)

    async def _take(self, line: str, name: str, missing: dict[str, tuple[Request, Call]]) -> None:
        """One line of what a batch came to."""
        try:
            row = json.loads(line)
            key, response = row["custom_id"], row.get("response")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # the request counts as not answered
        if (
            not isinstance(key, str)
            or key not in missing
            or not isinstance(response, dict)
            or response.get("status_code") != 200
        ):
            return
        planned = self._ledger.batched(name).get(key)
        if planned is None:
            return
        request, call = missing[key]
        reply = reply_of(json.dumps(response.get("body")), request, 0.0)
        taken = self._asker.keep(request, reply, read_reply(call, reply)[1] or GOOD, batch=True)
        self._asker.budget.spent += taken - Amount(1, *planned)

    async def _free(self, name: str, state: str) -> None:
        """Requests of this batch that have no reply will have none, and were not paid for."""
        for tokens, money in self._ledger.batched(name).values():
            self._asker.budget.spent -= Amount(1, tokens, money)
        self._ledger.end_batch(name, state)

    async def _made_as(self, name: str) -> str | None:
        """The endpoint's id of a batch that was made when the run ended, if it was."""
        async for batch in self._client.batches.list(limit=_LISTED):
            if (batch.metadata or {}).get("ultrafuser") == name:
                return batch.id
        return None

    def _refused(self, error: Exception) -> BaseException:
        if isinstance(error, InputError):
            return self._asker.end(error)
        return self._asker.end(
            InputError(f"endpoints.{self._endpoint}: batches: {one_line(error)}; the same command goes on")
        )


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Those of a file, which are held one at a time; what ends a line inside a text, as U+2028, ends none."""
    begun = bytearray()
    async for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            yield bytes(begun) + end
            begun.clear()
        begun += rest
        if len(begun) > _MOST_BYTES_OF_A_LINE:
            raise ValueError(f"a line of more than {_MOST_BYTES_OF_A_LINE >> 20} MiB in what a batch came to")
    yield bytes(begun)


def _line(request: Request) -> bytes:
    body: dict[str, Any] = {"custom_id": request.key, "method": "POST", "url": _PATH, "body": request.body}
    return json.dumps(body, ensure_ascii=False).encode() + b"\n"
