"""What both kinds of answers have in common: usage, reasons, gate weights, the frames of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent

from ultrafuser_mega.inference.text import Piece
from ultrafuser_mega.inference.text_engine import Answer, TracedToken
from ultrafuser_mega.serving.errors import ApiError
from ultrafuser_mega.serving.served import Served, Wanted

_PING, _PATIENCE = 15, 60  # seconds: between signs of life, and for a client to take what it is sent


def header(id: str, kind: str, served: Served) -> dict[str, Any]:
    """The fields that an answer and all chunks of a stream begin with."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": served.name}


def all_pieces(tokens: Sequence[TracedToken]) -> list[tuple[int, str, list[float]]]:
    """Those of an answer that is done, for ``gate_weights``."""
    return [(place, token.text, token.weights) for place, token in enumerate(tokens)]


def reason(answer: Answer) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if answer.finish_reason == "length" else "stop"


class Usage:
    """Counts a request's tokens, of all its answers together, and who led them.

    Args:
        served: the model.
        wanted: the answers.
    """

    def __init__(self, served: Served, wanted: Sequence[Wanted]) -> None:
        self._names = served.names
        # The n answers of one prompt count it once.
        asked = [one.request.prompt for one in wanted if one.request.row == 0]
        self._prompt = {name: sum(len(prompt[name]) for prompt in asked) for name in self._names}
        self._led = [0] * len(self._names)
        self._weights = [0.0] * len(self._names)
        self.tokens = 0

    def add(self, weights: Sequence[float]) -> None:
        """A token."""
        self.tokens += 1
        self._led[max(range(len(weights)), key=weights.__getitem__)] += 1
        for place, weight in enumerate(weights):
            self._weights[place] += weight

    def shown(self) -> dict[str, Any]:
        """As OpenAI has it, and for every specialist its prompt's tokens, those that it led and its mean weight."""
        prompt = self._prompt[self._names[0]]
        specialists = {
            name: {
                "prompt_tokens": self._prompt[name],
                "led_tokens": self._led[place],
                "mean_gate_weight": round(self._weights[place] / self.tokens, 6) if self.tokens else None,
            }
            for place, name in enumerate(self._names)
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
            "specialists": specialists,
        }


def gate_weights(served: Served, pieces: Iterable[tuple[int, str, Sequence[float]]]) -> dict[str, Any]:
    """This server's own: which specialist chose which piece of text; (place of its token, text, weights)."""
    rounded = [
        {"index": place, "text": text, "weights": [round(weight, 6) for weight in weights]}
        for place, text, weights in pieces
    ]
    return {"specialists": served.names, "tokens": rounded}


class Shown:
    """The weights of one answer's tokens so far, for pieces of text that are shown later than their token came."""

    def __init__(self) -> None:
        self._weights: list[list[float]] = []

    def add(self, weights: list[float]) -> None:
        """A token came."""
        self._weights.append(weights)

    def of(self, pieces: Iterable[Piece]) -> list[tuple[int, str, list[float]]]:
        """Text with the place and the weights of its token."""
        return [(piece.token, piece.text, self._weights[piece.token]) for piece in pieces]


def _frame(chunk: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(chunk, ensure_ascii=False), sep="\n")


async def stream(chunks: AsyncGenerator[dict[str, Any], None]) -> EventSourceResponse:
    """Chunks as server-sent events, once there is a first one; an error behind it is the last event.

    Raises:
        ApiError: there is none: the answer is refused, with a status of its own.
    """
    first = await anext(chunks)

    async def frames() -> AsyncIterator[ServerSentEvent]:
        async with aclosing(chunks):
            yield _frame(first)
            try:
                async for chunk in chunks:
                    yield _frame(chunk)
                yield ServerSentEvent("[DONE]", sep="\n")
            except ApiError as error:
                yield _frame(error.body())

    return EventSourceResponse(frames(), ping=_PING, send_timeout=_PATIENCE, sep="\n")
