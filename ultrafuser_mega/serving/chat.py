"""/v1/chat/completions: answers to a conversation that every specialist reads in its own template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ultrafuser_mega.inference.requests import PromptEvent, TokenEvent
from ultrafuser_mega.serving.bodies import ChatBody
from ultrafuser_mega.serving.grammar import Vocabulary
from ultrafuser_mega.serving.served import Served, Wanted
from ultrafuser_mega.serving.shapes import Shown, Usage, all_pieces, gate_weights, header, reason
from ultrafuser_mega.serving.traffic import Traffic, all_answers


async def answered(
    body: ChatBody, id: str, wanted: Sequence[Wanted], served: Served, traffic: Traffic
) -> dict[str, Any]:
    """All answers at once."""
    ends, _ = await all_answers(traffic, wanted)
    usage = Usage(served, wanted)
    choices = []
    for place, end in enumerate(ends):
        answer = end.answer
        assert answer is not None
        for token in answer.tokens:
            usage.add(token.weights)
        choice: dict[str, Any] = {
            "index": place,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason(answer),
        }
        if body.logprobs:
            tokens = [_logprob(served.vocabulary, token.id, token.logprob, token.top) for token in answer.tokens]
            choice["logprobs"] = {"content": tokens}
        if body.gate_weights:
            choice["gate_weights"] = gate_weights(served, all_pieces(answer.tokens))
        choices.append(choice)
    return {**header(id, "chat.completion", served), "choices": choices, "usage": usage.shown()}


async def chunks(
    body: ChatBody, id: str, wanted: Sequence[Wanted], served: Served, traffic: Traffic
) -> AsyncGenerator[dict[str, Any], None]:
    """The same piece by piece."""
    opening = header(id, "chat.completion.chunk", served)
    usage = Usage(served, wanted)
    shown = [Shown() for _ in wanted]

    def chunk(place: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**opening, "choices": [{"index": place, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    async with aclosing(traffic.answers(wanted)) as events:
        greeted = False
        async for place, event in events:
            assert not isinstance(event, PromptEvent)
            if not greeted:  # not before: what is refused has no stream
                for other in range(len(wanted)):
                    yield chunk(other, {"role": "assistant", "content": ""})
                greeted = True
            usage.add(event.token.weights)
            shown[place].add(event.token.weights)
            text = "".join(piece.text for piece in event.pieces)
            if text or body.logprobs:
                part = chunk(place, {"content": text})
                if body.logprobs:
                    part["choices"][0]["logprobs"] = {"content": [_event_logprob(served.vocabulary, event.token)]}
                if body.gate_weights:
                    part["choices"][0]["gate_weights"] = gate_weights(served, shown[place].of(event.pieces))
                yield part
            if event.answer is not None:
                yield chunk(place, {}, reason(event.answer))
    if body.wants_usage:
        yield {**opening, "choices": [], "usage": usage.shown()}


def _event_logprob(vocabulary: Vocabulary, token: TokenEvent) -> dict[str, Any]:
    return _logprob(vocabulary, token.token, token.logprob, token.top)


def _logprob(
    vocabulary: Vocabulary, token: int, logprob: float | None, top: Sequence[tuple[int, float]] | None
) -> dict[str, Any]:
    others = [_one(vocabulary, other, value) for other, value in top or ()]
    return {**_one(vocabulary, token, logprob or 0.0), "top_logprobs": others}


def _one(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    # JSON has no -inf, which a forbidden token's is
    return {
        "token": vocabulary.text(token),
        "logprob": max(logprob, -9999.0),
        "bytes": list(vocabulary.bytes(token)),
    }
