"""Asks models: from the ledger what was answered before, the rest over HTTP, within the budget, as many as are taken.

What may pass is tried again (turned away, no answer, a host in trouble); what cannot (no key, no such model, no money
left) ends the run in one line; what concerns one request alone (too long, forbidden) ends that one. A reply that
cannot be used is kept and paid for, and asked for again under a number of its own, by which the ledger tells attempts
apart.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.openai_client import one_line, open_async_client
from ultrafuser_mega.synthesis.admission import Gate, retry_after_s
from ultrafuser_mega.synthesis.budget import Amount, Budget, LimitReachedError, cost_of
from ultrafuser_mega.synthesis.config import Step, SynthesisConfig
from ultrafuser_mega.synthesis.ledger import Ledger
from ultrafuser_mega.synthesis.progress import Progress
from ultrafuser_mega.synthesis.requests import (
    EMPTY,
    GOOD,
    MALFORMED,
    REFUSED,
    Answer,
    Call,
    Form,
    Reply,
    Request,
    UnreadableError,
    reply_of,
)

_OVERLOADED = (429, 503, 529)
_ENDS_ALL = {401: "the key is refused", 403: "access is refused", 404: "there is no such model or address"}
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")
_FORBIDDEN = ("content_filter", "content_policy_violation", "context_length_exceeded")
_REJECTED = "rejected: "  # before any model saw it
_NEVER_LEFT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
_LOOKED_UP = 500  # calls at once in the ledger
_DEAD = 50  # failures in a row, without one answer between them
_NEVER_ALIVE = 8  # the same, of an endpoint that has answered nothing yet
_TURNED_AWAY_FOR_S = 1800.0  # then an endpoint that turns everything away ends the run
_LONGEST_BACKOFF_S = 30.0
_TIMES = 2  # an endpoint's timeout, which is of every silence: of a reply that comes drop by drop
_PROBE = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}},
    "required": ["words"],
    "additionalProperties": False,
}
_REPAIR = "That has not the form that was asked for. Give the same again in this form."

NO_ANSWER = "no answer"


class InterruptedRunError(Exception):
    """A signal asked the run to end; what was under way has been waited for."""


class NoAnswerError(Exception):
    """The endpoint does not answer this request; the message says how."""


class Asker:
    """Asks what a run has to ask.

    Args:
        config: of the run.
        ledger: open.
        progress: is told what happens.

    Attributes:
        gates: by model.
        stop: what ends the run, once something does; nothing is sent any more.
    """

    def __init__(self, config: SynthesisConfig, ledger: Ledger, progress: Progress) -> None:
        self.config = config
        self.ledger = ledger
        self.progress = progress
        self.budget = Budget(config.limit, _spent(ledger), config.currency)
        self.gates = {
            name: Gate(
                config.endpoints[model.endpoint].concurrency, config.endpoints[model.endpoint].requests_per_minute
            )
            for name, model in config.models.items()
        }
        self.stop: BaseException | None = None
        self._clients: dict[str, Any] = {}
        self._failures = dict.fromkeys(config.models, 0)
        self._alive = dict.fromkeys(config.models, False)
        self._probes = {name: asyncio.Lock() for name in config.models}
        self._random = random.Random(0)

    async def ask_all(self, calls: Sequence[Call]) -> list[Answer]:
        """An answer to every call, in their order; all are of one class and step."""
        if not calls:
            return []
        step = self.config.step(calls[0].of, calls[0].step)
        self.progress.plan(calls[0].of, calls[0].step, len(calls))
        if step.batch:
            from ultrafuser_mega.synthesis.batch import ask_in_batches

            return await ask_in_batches(self, calls, step)
        answers: list[Answer | None] = [None] * len(calls)
        for first in range(0, len(calls), _LOOKED_UP):
            answers[first : first + _LOOKED_UP] = await self._known(calls[first : first + _LOOKED_UP], step)
            await asyncio.sleep(0)  # replies of the ledger wait for nothing: let others in
        open_places = [place for place, answer in enumerate(answers) if answer is None]
        places = iter(open_places)

        async def work() -> None:
            for place in places:
                answers[place] = await self.ask(calls[place], step)

        workers = min(len(open_places), self.gates[step.model].most)
        ended = await asyncio.gather(*(work() for _ in range(workers)), return_exceptions=True)
        for end in ended:
            if isinstance(end, BaseException):
                raise self.stop or end
        return [answer for answer in answers if answer is not None]

    async def ask(self, call: Call, step: Step) -> Answer:
        """An answer to one call, after as many attempts as the step allows."""
        faults: list[str] = []
        last: Reply | None = None
        for attempt in range(step.retries + 1):
            request = await self.request(call, step, attempt, last)
            last = self.ledger.find(request.key)
            if last is not None:
                self.progress.kept(call.of, call.step)
            else:
                try:
                    last = await self._send(request, call)
                except NoAnswerError as error:
                    self.progress.ended(call.of, call.step)
                    return Answer(None, None, (*faults, f"{NO_ANSWER}: {error}"))
            value, fault = read_reply(call, last)
            if fault is None:
                self.progress.ended(call.of, call.step)
                return Answer(value, request.key, tuple(faults))
            faults.append(fault)
            if (last.finish or "").startswith(_REJECTED):  # which asking again does not change
                break
        self.progress.ended(call.of, call.step)
        return Answer(None, request.key, tuple(faults))

    async def _known(self, calls: Sequence[Call], step: Step) -> list[Answer | None]:
        """What the ledger's replies to first attempts answer: in a run that goes on, nearly all."""
        requests = [await self.request(call, step, 0, None) for call in calls]
        replies = self.ledger.find_all([request.key for request in requests])
        answers: list[Answer | None] = []
        for call, request in zip(calls, requests, strict=True):
            reply = replies.get(request.key)
            value, fault = (None, EMPTY) if reply is None else read_reply(call, reply)
            answers.append(Answer(value, request.key) if fault is None else None)
            if fault is None:
                self.progress.kept(call.of, call.step)
                self.progress.ended(call.of, call.step)
        return answers

    async def request(self, call: Call, step: Step, attempt: int, last: Reply | None) -> Request:
        """What is sent at this attempt, behind ``last``, which could not be used."""
        model = self.config.models[step.model]
        form = call.form
        schema = form.schema if form.schema is not None and await self._takes_schema(step.model) else None
        said = form.as_text if schema is None else form.as_json
        messages = list(call.messages)
        if said:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content'].rstrip()}\n\n{said}"}
        if attempt % 2 == 1 and said and last is not None and last.fault is None:
            repair = {"role": "user", "content": f"{_REPAIR} {said}"}
            messages += [{"role": "assistant", "content": last.text}, repair]
        number = f"{call.number}.{attempt}"
        body: dict[str, Any] = {"model": model.model, "messages": messages, **model.parameters}
        body[model.max_tokens_name] = step.max_tokens
        body |= {} if step.temperature is None else {"temperature": step.temperature}
        body |= {} if step.top_p is None else {"top_p": step.top_p}
        if model.seed:
            text = json.dumps([self.config.seed, call.of, call.step, messages, number], ensure_ascii=False)
            body["seed"] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
        if schema is not None:
            body["response_format"] = _response_format(schema)
        return Request(call.of, call.step, step.model, body, call.version, number)

    def most(self, request: Request, *, batch: bool = False) -> Amount:
        """What it can take."""
        read, written = request.most_read, request.most_written
        price = self.config.models[request.model].price
        return Amount(1, read + written, cost_of(price, read, written, batch=batch))

    def keep(self, request: Request, reply: Reply, verdict: str, *, batch: bool = False) -> Amount:
        """Write a reply down; returns what it took."""
        price = self.config.models[request.model].price
        cost = cost_of(price, reply.read, reply.written, batch=batch)
        self.ledger.keep(request, reply, cost, verdict)
        taken = Amount(1, reply.read + reply.written, cost)
        self.progress.asked(request.of, request.step, verdict, taken)
        return taken

    def client(self, model: str) -> Any:
        """Of the endpoint that has this model."""
        name = self.config.models[model].endpoint
        if name not in self._clients:
            endpoint = self.config.endpoints[name]
            self._clients[name] = open_async_client(f"endpoints.{name}", endpoint.url, endpoint.key, endpoint.timeout_s)
        return self._clients[name]

    def end(self, reason: BaseException) -> BaseException:
        """Nothing is sent any more; returns why, which is the first reason given."""
        self.stop = self.stop or reason
        for gate in self.gates.values():
            gate.hurry()
        return self.stop

    async def close(self) -> None:
        """Let connections go."""
        for client in self._clients.values():
            await client.close()

    async def _takes_schema(self, name: str) -> bool:
        model = self.config.models[name]
        if model.json_schema is not None:
            return model.json_schema
        fact = f"json_schema {model.model} {self.config.endpoints[model.endpoint].url}"
        async with self._probes[name]:
            known = self.ledger.fact(fact)
            if known is None:
                words: tuple[dict[str, str], ...] = ({"role": "user", "content": 'Say {"words": ["yes"]}.'},)
                body = {"model": model.model, "messages": list(words), model.max_tokens_name: 32}
                request = Request("", "probe", name, {**body, "response_format": _response_format(_PROBE)}, "1", "0")
                try:
                    call = Call("", "probe", words, Form(str))
                    reply = self.ledger.find(request.key) or await self._send(request, call)
                    known = "no" if reply.raw is not None else "yes"
                except NoAnswerError:
                    known = "no"
                self.ledger.note(fact, known)
        return known == "yes"

    async def _send(self, request: Request, call: Call) -> Reply:
        """The reply to a request that the ledger has none of.

        Raises:
            NoAnswerError: this request gets none.
            InputError, LimitReachedError, InterruptedRunError: nor does any other.
        """
        gate, model = self.gates[request.model], self.config.models[request.model]
        endpoint = self.config.endpoints[model.endpoint]
        client, most = self.client(request.model), self.most(request)
        # What OpenAI's protocol does not know, as {top_k: 40}, the client takes apart from the rest.
        known = {name: value for name, value in request.body.items() if name not in model.parameters}
        failed, turned_away_since = 0, None
        while True:
            left_at = await gate.enter()
            taken = Amount()
            try:
                if self.stop is not None:
                    raise self.stop
                try:
                    await self.budget.reserve(most)
                except LimitReachedError as error:
                    raise self.end(error) from None
                try:
                    self.ledger.sending(request, most.tokens, most.money)
                    began = time.monotonic()
                    try:
                        async with asyncio.timeout(_TIMES * endpoint.timeout_s):
                            raw = await client.chat.completions.with_raw_response.create(
                                **known, extra_body=model.parameters or None
                            )
                        text = raw.text
                    except Exception as error:
                        if (code := getattr(error, "code", None)) in _FORBIDDEN:
                            reply = Reply("", finish=f"{_REJECTED}{code}", refusal=one_line(error))
                            taken = self.keep(request, reply, REFUSED)
                            return reply
                        why, taken = self._failed(request, error, left_at, most)
                    else:
                        reply = reply_of(text, request, time.monotonic() - began)
                        self._failures[request.model], self._alive[request.model] = 0, True
                        gate.answered(reply.seconds, reply.written)
                        taken = self.keep(request, reply, read_reply(call, reply)[1] or GOOD)
                        return reply
                finally:
                    await self.budget.settle(most, taken)
            except InputError as error:
                raise self.end(error) from None
            finally:
                await gate.leave()
            if why is None:
                turned_away_since = turned_away_since or time.monotonic()
                if time.monotonic() - turned_away_since > max(_TURNED_AWAY_FOR_S, 2 * endpoint.timeout_s):
                    raise self.end(InputError(f"endpoints.{model.endpoint}: turns everything away for half an hour"))
            else:
                failed, turned_away_since = failed + 1, None
                if failed >= endpoint.tries:
                    raise NoAnswerError(why)
                await asyncio.sleep(min(_LONGEST_BACKOFF_S, 0.5 * 2 ** (failed - 1)) * self._random.random())

    def _failed(self, request: Request, error: Exception, left_at: float, most: Amount) -> tuple[str | None, Amount]:
        """What a request that failed comes to: why, or None where it was turned away; and what it may have taken."""
        from openai import APIConnectionError, APIStatusError

        of, step = request.of, request.step
        name = self.config.models[request.model].endpoint
        if isinstance(error, APIConnectionError | TimeoutError):
            why = one_line(error)
            if isinstance(error, TimeoutError):
                why = f"no whole reply in {_TIMES} x endpoints.{name}.timeout_s"
            if isinstance(error.__cause__, Exception):  # which says what kind of trouble it is
                why = f"{why.rstrip('.')}: {one_line(error.__cause__)}"
            if type(error.__cause__).__name__ in _NEVER_LEFT:
                self.ledger.unpaid(request.key)
                taken = Amount()
            else:
                self.ledger.lose(request.key, why)
                taken = most
            self.progress.failed(of, step, taken)
            self._count_failure(request.model, why)
            return why, taken
        self.ledger.unpaid(request.key)
        if not isinstance(error, APIStatusError):
            raise error
        status, code = error.status_code, str(getattr(error, "code", None) or "")
        if code in _NO_MONEY or status == 402:
            raise InputError(f"endpoints.{name}: {one_line(error)}; the same command goes on once it is paid")
        if status in _ENDS_ALL:
            raise InputError(f"endpoints.{name}: {_ENDS_ALL[status]} ({one_line(error)})")
        if status in _OVERLOADED:
            self.gates[request.model].turned_away(left_at, retry_after_s(error.response.headers))
            self.progress.turned_away(of, step)
            return None, Amount()
        self.progress.failed(of, step, Amount())
        if status < 500 and status not in (408, 409):
            if step != "probe":
                self._count_failure(request.model, one_line(error))
            raise NoAnswerError(one_line(error))
        self._count_failure(request.model, one_line(error))
        return one_line(error), Amount()

    def _count_failure(self, model: str, reason: str) -> None:
        self._failures[model] += 1
        if self._failures[model] >= (_DEAD if self._alive[model] else _NEVER_ALIVE):
            name = self.config.models[model].endpoint
            raise InputError(
                f"endpoints.{name}: the last {self._failures[model]} requests failed ({reason}); "
                "what was answered is kept, the same command goes on"
            )


def read_reply(call: Call, reply: Reply) -> tuple[Any, str | None]:
    """(what was asked for, None), or (None, why it cannot be used)."""
    if reply.fault is not None:
        return None, reply.fault
    try:
        return call.form.read(reply.text), None
    except UnreadableError:
        return None, MALFORMED


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}


def _spent(ledger: Ledger) -> Amount:
    amount = Amount()
    for total in ledger.totals():
        amount += Amount(total.replies, total.read + total.written, total.cost)
    for lost in (ledger.lost(), ledger.under_way_in_batches()):
        amount += Amount(lost.requests, lost.tokens, lost.cost)
    return amount
