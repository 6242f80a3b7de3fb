"""/v1/completions: text that goes on as it stands; with its own log-probabilities where they are wanted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ultrafuser_mega.inference.requests import PromptEvent
from ultrafuser_mega.serving.bodies import CompletionBody
from ultrafuser_mega.serving.grammar import Vocabulary
from ultrafuser_mega.serving.served import Served, Wanted
from ultrafuser_mega.serving.shapes import Shown, Usage, all_pieces, gate_weights, header, reason
from ultrafuser_mega.serving.traffic import Traffic, all_answers

Top = Sequence[tuple[int, float]] | None


class _Logprobs:
    """Grows with the tokens of one text; OpenAI's four lists."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offset = 0

    def of(self, tokens: Sequence[tuple[int, float | None, Top]]) -> dict[str, Any]:
        """The lists for what follows: (token, log-probability, likeliest)."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in tokens:
            text = self._vocabulary.text(token)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(None if logprob is None else max(logprob, -9999.0))
            lists["top_logprobs"].append(None if logprob is None else self._likeliest(text, logprob, top))
            lists["text_offset"].append(self._offset)
            self._offset += 0 if self._vocabulary.special(token) else len(text)
        return lists

    def _likeliest(self, text: str, logprob: float, top: Top) -> dict[str, float]:
        likeliest: dict[str, float] = {}
        for other, value in top or ():  # the likelier one, where two are written alike
            likeliest.setdefault(self._vocabulary.text(other), max(value, -9999.0))
        likeliest.setdefault(text, max(logprob, -9999.0))
        return likeliest


def _of_prompt(wanted: Wanted, event: PromptEvent, logprobs: _Logprobs) -> dict[str, Any]:
    ids = next(iter(wanted.request.prompt.values()))
    return logprobs.of(
        [
            (token, None, None) if known is None else (token, known.logprob, known.top)
            for token, known in zip(ids, event.tokens, strict=True)
        ]
    )


async def answered(
    body: CompletionBody, id: str, wanted: Sequence[Wanted], served: Served, traffic: Traffic
) -> dict[str, Any]:
    """All answers at once."""
    ends, prompts = await all_answers(traffic, wanted)
    usage = Usage(served, wanted)
    choices = []
    for place, end in enumerate(ends):
        answer = end.answer
        assert answer is not None
        text, finish, tokens = answer.text, reason(answer), answer.tokens
        if body.max_tokens == 0:
            text, finish, tokens = "", "length", []
        for token in tokens:
            usage.add(token.weights)
        lists = _Logprobs(served.vocabulary)
        logprobs: dict[str, Any] | None = None
        if body.echo:
            text = wanted[place].echo + text
        if place in prompts:
            logprobs = _of_prompt(wanted[place], prompts[place], lists)
        if body.logprobs is not None:
            after = lists.of([(token.id, token.logprob, token.top) for token in tokens])
            logprobs = after if logprobs is None else {name: logprobs[name] + after[name] for name in after}
        choice: dict[str, Any] = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if body.gate_weights:
            choice["gate_weights"] = gate_weights(served, all_pieces(tokens))
        choices.append(choice)
    return {**header(id, "text_completion", served), "choices": choices, "usage": usage.shown()}


async def chunks(
    body: CompletionBody, id: str, wanted: Sequence[Wanted], served: Served, traffic: Traffic
) -> AsyncGenerator[dict[str, Any], None]:
    """The same piece by piece."""
    opening = header(id, "text_completion", served)
    usage = Usage(served, wanted)
    shown = [Shown() for _ in wanted]
    lists = [_Logprobs(served.vocabulary) for _ in wanted]

    def chunk(place: int, text: str, finish: str | None = None) -> dict[str, Any]:
        return {**opening, "choices": [{"index": place, "text": text, "logprobs": None, "finish_reason": finish}]}

    async with aclosing(traffic.answers(wanted)) as events:
        echoed = not body.echo
        async for place, event in events:
            if not echoed:
                for other in range(len(wanted)):
                    yield chunk(other, wanted[other].echo)
                echoed = True
            if isinstance(event, PromptEvent):
                part = chunk(place, "")
                part["choices"][0]["logprobs"] = _of_prompt(wanted[place], event, lists[place])
                yield part
                continue
            if body.max_tokens != 0:
                usage.add(event.token.weights)
                shown[place].add(event.token.weights)
                text = "".join(piece.text for piece in event.pieces)
                if text or body.logprobs is not None:
                    part = chunk(place, text)
                    if body.logprobs is not None:
                        token = event.token
                        part["choices"][0]["logprobs"] = lists[place].of([(token.token, token.logprob, token.top)])
                    if body.gate_weights:
                        part["choices"][0]["gate_weights"] = gate_weights(served, shown[place].of(event.pieces))
                    yield part
            if event.answer is not None:
                yield chunk(place, "", "length" if body.max_tokens == 0 else reason(event.answer))
    if body.wants_usage:
        yield {**opening, "choices": [], "usage": usage.shown()}
