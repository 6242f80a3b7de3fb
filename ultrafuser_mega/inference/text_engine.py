"""Text from an engine's tokens: shown when it is certain, ended at stop strings; for one thread, as the engine is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from ultrafuser_mega.inference.requests import Engine, FailedEvent, PromptEvent, Request, TokenEvent
from ultrafuser_mega.inference.text import Piece, TextStream

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class TracedToken:
    """One token of an answer.

    Attributes:
        id: the token.
        text: what it added to the text.
        weights: of the specialists behind the choice.
        logprob, top: see :class:`TokenEvent`.
    """

    id: int
    text: str
    weights: list[float]
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without control tokens, stop string and what follows it.
        tokens: as generated, the ending one included.
        finish_reason: "eos", "stop" (a stop string) or "length".
    """

    text: str
    tokens: list[TracedToken]
    finish_reason: FinishReason

    def mean_weights(self) -> list[float]:
        """Average gate weight of each specialist over the tokens."""
        columns = zip(*(token.weights for token in self.tokens), strict=True)
        return [sum(column) / len(self.tokens) for column in columns]


@dataclass(frozen=True)
class TextEvent:
    """A token came.

    Attributes:
        id: of the request.
        token: as the engine gave it.
        pieces: text that may be shown now, in order; of earlier tokens too, where it was held back until now. Their
            ``token`` counts the answer's tokens from 0.
        answer: the whole, with the last token.
    """

    id: str
    token: TokenEvent
    pieces: list[Piece]
    answer: Answer | None = None


@dataclass
class _Underway:
    text: TextStream
    tokens: list[TokenEvent] = field(default_factory=list)


class TextEngine:
    """An engine whose answers are text.

    Args:
        engine: of tokens.
        tokenizer: of the model.
        response_lead: text that every response begins with and nobody wants to see (the configuration's).
        eos: tokens that end an answer and have no text.
    """

    def __init__(self, engine: Engine, tokenizer: Any, response_lead: str, eos: Collection[int]) -> None:
        self.engine = engine
        self._tokenizer, self._response_lead, self._eos = tokenizer, response_lead, eos
        self._underway: dict[str, _Underway] = {}

    def submit(self, request: Request, *, stop: tuple[str, ...] = (), lead: bool = True) -> None:
        """Take up a request; see :meth:`Engine.submit`.

        Args:
            request: for the engine.
            stop: strings that end the answer.
            lead: whether it begins with ``response_lead``, as answers in a conversation do and continued text does not.
        """
        self.engine.submit(request)
        prefix = self._response_lead if lead else ""
        self._underway[request.id] = _Underway(TextStream(self._tokenizer, prefix, stop, request.eos or self._eos))

    def cancel(self, id: str) -> None:
        """End a request now; no further event names it."""
        self._underway.pop(id, None)
        self.engine.cancel(id)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or waits."""
        return self.engine.idle

    def step(self) -> list[TextEvent | PromptEvent | FailedEvent]:
        """What the engine's next step gave; see :meth:`Engine.step`."""
        try:
            events = self.engine.step()
        except BaseException:
            self._underway.clear()
            raise
        shown: list[TextEvent | PromptEvent | FailedEvent] = []
        for event in events:
            if event.id not in self._underway:  # ended at a stop string, in this step
                continue
            if isinstance(event, TokenEvent):
                shown.append(self._read(event))
                continue
            if isinstance(event, FailedEvent):
                del self._underway[event.id]
            shown.append(event)
        return shown

    def _read(self, event: TokenEvent) -> TextEvent:
        row = self._underway[event.id]
        row.tokens.append(event)
        pieces = row.text.push(event.token)
        reason: FinishReason | None = event.finish
        if event.finish != "eos" and row.text.stopped:
            reason = "stop"
        if reason is None:
            return TextEvent(event.id, event, pieces)
        pieces += row.text.finish()
        if event.finish is None:
            self.engine.cancel(event.id)
        del self._underway[event.id]
        traced = [
            TracedToken(token.token, piece.text, token.weights, token.logprob, token.top)
            for token, piece in zip(row.tokens, row.text.pieces(), strict=True)
        ]
        return TextEvent(event.id, event, pieces, Answer(row.text.text, traced, reason))
