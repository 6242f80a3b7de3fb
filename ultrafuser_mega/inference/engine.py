"""The engine of this package: requests enter and leave a running batch at any step, on any machine.

Every step reads a bounded piece of the prompts that came and gives every answer under way its next token, or, with
drafts, its next few. A request enters when every specialist's cache has room for its prompt and the longest answer that
it may get; what its prompts have in common with earlier ones is not read again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.draft_length import DraftLength
from ultrafuser_mega.inference.drafting import next_round
from ultrafuser_mega.inference.lanes import Lanes, answer_room
from ultrafuser_mega.inference.likely import likeliest
from ultrafuser_mega.inference.mixing import GATE, RULES, Evidence, Rule
from ultrafuser_mega.inference.prefill import Prefill
from ultrafuser_mega.inference.requests import (
    EngineStats,
    Event,
    FailedEvent,
    Finish,
    Likely,
    PromptEvent,
    Request,
    TokenEvent,
    never_fits,
    refuse_unknown,
)
from ultrafuser_mega.inference.sampling import choose
from ultrafuser_mega.inference.underway import Underway
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

NOT_FINITE = "the model's logits are not finite: its weights are damaged (ultrafuser verify), or overflow in --dtype"


class EmbeddedEngine:
    """An :class:`~ultrafuser_mega.inference.requests.Engine` that computes in this process.

    Args:
        model: its specialists are on their devices already.
        rule: how they are mixed.
        tokens: that every specialist's cache has room for.
        rows: requests that are under way at a time, at most.
        draft: tokens that a specialist drafts, or that are guessed for the only one, at most; 0: none.
        chunk: tokens of prompts that a step reads, at most.
        adapt: whether drafts are shortened where they do not pay (see ``draft_length``).
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        rule: Rule = RULES[GATE],
        *,
        tokens: int,
        rows: int = 64,
        draft: int = 0,
        chunk: int = 512,
        adapt: bool = True,
    ) -> None:
        self.lanes = Lanes(model, tokens)
        self._names, self._rule, self._rows = list(model.names), rule, rows
        self._vocabulary = model.config.vocab_size
        self._prefill = Prefill(self.lanes, rule, chunk)
        self._alone = len(self._names) == 1
        self._length = DraftLength(0 if rule.reads_text else draft, adapt, guesses=self._alone)
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, Underway] = {}
        self._chosen = 0
        self._passes = dict.fromkeys(self._names, 0)

    def submit(self, request: Request) -> None:
        """See :meth:`Engine.submit`."""
        if request.id in self._waiting or request.id in self._running or request.id in self._prefill.rows:
            raise ValueError(f"request {request.id!r} is under way already")
        refuse_unknown(request, self._names, self._vocabulary)
        if request.prompt_logprobs and self._rule.reads_text:
            raise InputError("prompt_logprobs: not known where specialists are mixed by the likelihood of the text")
        longest = self._longest(request)
        for name, ids in request.prompt.items():
            total = self.lanes.pools[name].slots.total
            if len(ids) + longest > total + 1:  # the last token is never read
                raise never_fits(name, len(ids), longest, total)
        self._waiting[request.id] = request

    @torch.inference_mode()
    def cancel(self, id: str) -> None:
        """See :meth:`Engine.cancel`."""
        self._waiting.pop(id, None)
        if (row := self._running.get(id) or self._prefill.rows.get(id)) is not None:
            self._leave(row)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or waits."""
        return not (self._waiting or self._running or self._prefill.rows)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """See :meth:`Engine.step`."""
        try:
            self._admit()
            events = self._first_tokens(self._prefill.step())
            if self._running:
                events += self._next_tokens()
            return events
        except BaseException:  # a half-done step: nothing that is held can be trusted
            self._running.clear()
            self._prefill.rows.clear()
            self._waiting.clear()
            for pool in self.lanes.pools.values():
                pool.clear()
            raise

    def stats(self) -> EngineStats:
        """See :meth:`Engine.stats`."""
        slots = {name: pool.slots for name, pool in self.lanes.pools.items()}
        return EngineStats(
            free={name: own.free for name, own in slots.items()},
            total={name: own.total for name, own in slots.items()},
            running=len(self._running) + len(self._prefill.rows),
            waiting=len(self._waiting),
            drafted=self._length.drafted,
            accepted=self._length.accepted,
            passes=dict(self._passes),
            tokens=self._chosen,
            prompt_tokens=dict(self._prefill.asked),
            prefix_hits=dict(self._prefill.known),
        )

    def _longest(self, request: Request) -> int:
        return min(request.max_new_tokens, answer_room(request.prompt, self.lanes.positions))

    def _admit(self) -> None:
        """First come, first served: one that does not fit yet keeps those behind it waiting."""
        while self._waiting and len(self._running) + len(self._prefill.rows) < self._rows:
            request = next(iter(self._waiting.values()))
            if not self._prefill.take(request, self._longest(request)):
                return
            self._waiting.popitem(last=False)

    def _leave(self, row: Underway) -> None:
        for held in (self._running, self._prefill.rows):
            held.pop(row.request.id, None)
        if not self._rule.reads_text:
            self.lanes.keep(row.sequences)
        self.lanes.close(row.sequences)

    def _first_tokens(self, rows: list[Underway]) -> list[Event]:
        """Of answers whose prompts have been read."""
        if not rows:
            return []
        self._running.update((row.request.id, row) for row in rows)
        hidden = {name: torch.cat([row.states[name] for row in rows]) for name in self._names}
        logits = self.lanes.own_logits(hidden)
        events: list[Event] = [PromptEvent(row.request.id, row.prompt) for row in rows if row.request.prompt_logprobs]
        for row in rows:
            row.states.clear()
        return events + self._advance(rows, [1] * len(rows), hidden, logits)

    def _next_tokens(self) -> list[Event]:
        rows = list(self._running.values())
        began = time.perf_counter()
        length = self._length.choose([row.leader for row in rows], len(self._names))
        found = next_round(self.lanes, rows, length)
        for name, passes in found.passes.items():
            self._passes[name] += passes
        drafts = [len(row.drafts) for row in rows]
        before = [len(row.answer) for row in rows]
        events = self._advance(rows, found.counts, found.hidden, found.logits)
        gained = [len(row.answer) - had for row, had in zip(rows, before, strict=True)]
        accepted = [min(drafted, max(got - 1, 0)) for drafted, got in zip(drafts, gained, strict=True)]
        if self._alone:
            for row, drafted, right in zip(rows, drafts, accepted, strict=True):
                row.trusted = right if drafted else row.trusted
        self._length.learn(drafts, accepted, sum(found.passes.values()), found.read, time.perf_counter() - began)
        return events

    def _advance(
        self, rows: list[Underway], counts: list[int], hidden: dict[str, Tensor], logits: dict[str, Tensor]
    ) -> list[Event]:
        """Choose behind every place of every row (see ``Round``); what a row's own drafts agree with is its answer."""
        owners = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        gate = self.lanes.gate_weights(hidden)
        evidence = Evidence.behind(gate, [row.end for row in owners if row.end is not None])
        own = [logits[name] for name in self._names]
        alone = [part.log_softmax(-1) for part in own] if self._rule.reads_text else []
        scores, weights = self._rule.mix(own, evidence)
        finite = scores.isfinite().all(-1)
        chosen = choose(scores, [row.place(i) for row, count in zip(rows, counts, strict=True) for i in range(count)])
        if alone:
            gained = torch.cat([part.gather(1, chosen[:, None]) for part in alone], dim=1)
            for row, more in zip(rows, gained.split(1), strict=True):
                assert row.end is not None and row.end.response is not None
                row.end = replace(row.end, response=row.end.response + more)
        likely = likeliest(scores, chosen, [row.request.top_logprobs for row in owners])
        return self._emitted(rows, counts, chosen.tolist(), finite.tolist(), weights.float().tolist(), likely)

    def _emitted(
        self,
        rows: list[Underway],
        counts: list[int],
        tokens: list[int],
        finite: list[bool],
        weights: list[list[float]],
        likely: list[Likely | None],
    ) -> list[Event]:
        events: list[Event] = []
        end = 0
        for row, count in zip(rows, counts, strict=True):
            start, end = end, end + count
            drafts, request = list(row.drafts), row.request
            for at, place in enumerate(range(start, end)):
                if not finite[place]:
                    events.append(FailedEvent(request.id, NOT_FINITE))
                    self._leave(row)
                    break
                token = tokens[place]
                row.answer.append(token)
                self._chosen += 1
                finish: Finish | None = "eos" if token in request.eos else "length" if not row.left else None
                found = likely[place]
                logprob, top = (None, None) if found is None else (found.logprob, found.top)
                events.append(TokenEvent(request.id, token, weights[place], logprob, top, finish))
                if request.constraint is not None:
                    request.constraint.accept(token)
                row.leader = max(range(len(self._names)), key=weights[place].__getitem__)
                if finish:
                    row.settle()
                    self._leave(row)
                    break
                if at >= len(drafts) or token != drafts[at]:
                    row.settle()
                    break
        return events
