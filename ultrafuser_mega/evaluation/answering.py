"""Asking one model the items of one benchmark: turns, scores, speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from ultrafuser_mega.evaluation.benchmark import Benchmark, Item, Sample
from ultrafuser_mega.evaluation.benchmarks import HarnessBenchmark
from ultrafuser_mega.evaluation.contestants import Answering, Reply


def answer_items(
    model: str, answering: Answering, benchmark: Benchmark, items: Sequence[Item], max_new_tokens: int
) -> Iterator[Sample]:
    """A sample for every item, as they are done; items of several turns all get their first answer first.

    Args:
        model: its name.
        answering: the model, ready.
        benchmark: that the items are of.
        items: to ask.
        max_new_tokens: of a reply.
    """
    if isinstance(benchmark, HarnessBenchmark):
        yield from benchmark.samples(model, answering.harness_model(benchmark.name), items)
        return
    began = time.perf_counter()
    given: dict[int, list[Reply]] = {number: [] for number in range(len(items))}
    for turn in range(max((len(item.turns) for item in items), default=0)):
        asked = [number for number, item in enumerate(items) if len(item.turns) > turn]
        conversations = [_conversation(items[number], given[number]) for number in asked]
        for place, reply in answering.answer(conversations, max_new_tokens):
            number = asked[place]
            given[number].append(reply)
            if len(given[number]) == len(items[number].turns):
                seconds = time.perf_counter() - began
                yield _scored(model, benchmark, items[number], given.pop(number), seconds)


def _conversation(item: Item, replies: Sequence[Reply]) -> list[dict[str, str]]:
    messages = []
    for turn, text in enumerate(item.turns[: len(replies) + 1]):
        messages.append({"role": "user", "content": text})
        if turn < len(replies):
            # A template has no place for an answer of nothing.
            messages.append({"role": "assistant", "content": replies[turn].text.strip() or "."})
    return messages


def _scored(model: str, benchmark: Benchmark, item: Item, replies: Sequence[Reply], seconds: float) -> Sample:
    texts = tuple(reply.text for reply in replies)
    score = benchmark.score(item, texts)
    tokens = sum(reply.tokens for reply in replies)
    return Sample(
        model=model,
        benchmark=benchmark.name,
        item=item.id,
        group=item.group or item.id,
        category=item.category,
        turns=item.turns,
        replies=texts,
        score=score.value,
        extracted=score.extracted,
        rule=score.rule,
        tokens=tokens,
        finish=tuple(reply.finish for reply in replies),
        gate=_mean_gate(replies, tokens),
        seconds=round(seconds, 3),
    )


def _mean_gate(replies: Sequence[Reply], tokens: int) -> dict[str, float]:
    weighed: dict[str, float] = {}
    for reply in replies:
        gate: Mapping[str, float] = reply.gate
        for name, weight in gate.items():
            weighed[name] = weighed.get(name, 0.0) + weight * reply.tokens
    return {name: round(weight / max(tokens, 1), 4) for name, weight in weighed.items()}
