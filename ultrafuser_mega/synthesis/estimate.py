"""What a configuration will take, before anything is asked: calls, tokens, money and GPU-hours of every step.

Tokens of prompts are a quarter of their letters; of replies, what ``expected_tokens`` says, or else the sizes below.
Where a ledger has replies of a step already, their mean takes the place of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultrafuser_mega.synthesis.budget import cost_of
from ultrafuser_mega.synthesis.config import (
    COMPLICATED,
    INSTRUCTIONS,
    RELATED,
    RESPONSES,
    SUB_TOPICS,
    TOPICS,
    USER,
    SynthesisConfig,
)
from ultrafuser_mega.synthesis.ledger import FILE, Ledger
from ultrafuser_mega.synthesis.templates import Templates
from ultrafuser_mega.synthesis.topics import Topic, read_topics

_LETTERS_PER_TOKEN = 4
# Tokens of a reply, or of one item of a list.
_EXPECTED = {
    TOPICS: 30,
    SUB_TOPICS: 50,
    INSTRUCTIONS: 60,
    RELATED: 60,
    COMPLICATED: 150,
    RESPONSES: 500,
    USER: 30,
}
_TOPIC = Topic("A topic of some words", "A sentence or two that say why it matters to those who know the field well.")


@dataclass(frozen=True)
class Estimate:
    """Of one step of one class; ``measured`` is the number of replies that the tokens are the mean of."""

    of: str
    step: str
    calls: int
    read: int
    written: int
    money: float
    gpu_hours: float | None
    measured: int


def estimate(config: SynthesisConfig, folder: Path) -> list[Estimate]:
    """Every step of every class, in order.

    Args:
        folder: of the run, whose ledger is read if there is one.
    """
    measured = _measured(folder)
    found = []
    for of in config.classes:
        for step, (calls, items, prompt) in _calls(config, of).items():
            how = config.step(of, step)
            model = config.models[how.model]
            each_read = prompt // _LETTERS_PER_TOKEN
            each_written = min(how.max_tokens, items * (how.expected_tokens or _EXPECTED[step]))
            count = 0
            if (of, step) in measured:
                count, each_read, each_written = measured[of, step]
            read, written = calls * each_read, calls * each_written
            rate = model.tokens_per_gpu_s
            found.append(
                Estimate(
                    of,
                    step,
                    calls,
                    read,
                    written,
                    cost_of(model.price, read, written, batch=how.batch),
                    written / rate / 3600 if rate else None,
                    count,
                )
            )
    return found


def _calls(config: SynthesisConfig, of: str) -> dict[str, tuple[int, int, int]]:
    """Step -> (calls, items of a reply, letters of a prompt)."""
    data, templates = config.classes[of], Templates(config.classes[of].prompts)
    levels = _levels(config, of)
    path = tuple(_TOPIC.name for _ in levels)
    known: dict[str, Any] = {"domain": data.domain, "topic": _TOPIC, "parent": _TOPIC, "path": path}
    text = " ".join(["An instruction of usual length, which says in a sentence or two what is wanted."] * 3)
    found: dict[str, tuple[int, int, int]] = {}

    def add(step: str, calls: int, items: int, **values: Any) -> None:
        found[step] = (calls, items, len(templates.render(step, **known, **values)))

    if data.topics is not None:
        per_call = config.step(of, TOPICS).per_call
        add(TOPICS, -(-levels[0] // per_call), min(per_call, levels[0]), number=per_call, have=[])
        if len(levels) > 1:
            per_call = config.step(of, SUB_TOPICS).per_call
            calls = sum(above * -(-below // above // per_call) for above, below in pairwise(levels))
            items = min(per_call, -(-levels[-1] // levels[-2]))
            add(SUB_TOPICS, calls, items, number=per_call, have=[])
    seeds = -(-data.instructions // (1 + data.related.each))
    per_topic, per_call = -(-seeds // levels[-1]), config.step(of, INSTRUCTIONS).per_call
    calls = min(seeds, levels[-1] * -(-per_topic // per_call))
    add(INSTRUCTIONS, calls, min(per_call, per_topic), number=per_call, have=[text[:200]] * 8, call=0)
    if data.related.each:
        related = {"strong": data.related.strong, "weak": data.related.weak}
        add(RELATED, seeds, data.related.each, instruction=text, **related)
    if data.complicated:
        add(COMPLICATED, round(data.complicated * data.instructions), 1, instruction=text)
    turns = round(data.turns.share * data.instructions) * data.turns.most
    add(RESPONSES, data.instructions + turns, 1, instruction=text)
    if turns:
        calls, items, letters = found[RESPONSES]
        add(USER, turns, 1)
        found[USER] = (turns, 1, found[USER][2] + letters + _EXPECTED[RESPONSES] * _LETTERS_PER_TOKEN)
    return found


def _levels(config: SynthesisConfig, of: str) -> list[int]:
    data = config.classes[of]
    if data.topics is not None:
        return list(data.topics)
    assert data.topics_file is not None
    leaves = [leaf for topic in read_topics(data.topics_file) for leaf in topic.leaves()]
    return [len(leaves)]


def _measured(folder: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(Class, step) -> (replies, tokens read, written, of each)."""
    if not (folder / FILE).is_file():
        return {}
    ledger = Ledger(folder, read_only=True)
    try:
        sums: dict[tuple[str, str], list[int]] = {}
        for total in ledger.totals():
            row = sums.setdefault((total.of, total.step), [0, 0, 0])
            for place, value in enumerate((total.replies, total.read, total.written)):
                row[place] += value
    finally:
        ledger.close()
    return {key: (count, read // count, written // count) for key, (count, read, written) in sums.items()}
