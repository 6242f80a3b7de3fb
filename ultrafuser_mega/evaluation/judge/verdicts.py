"""Scores from a judge: AlpacaEval's pairs in both orders, MT-Bench's grades, the best of several answers.

A reply in which no verdict can be read is asked for again, warmer; after the last of ``_TEMPERATURES`` it counts for
nothing, and the other order or turn decides. A sample of which no verdict is left says so as its rule, NO_VERDICT, and
stays without a score.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TypeVar

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import NO_VERDICT, Item, Sample
from ultrafuser_mega.evaluation.judge.judges import Judge
from ultrafuser_mega.evaluation.judge.ledger import Request
from ultrafuser_mega.evaluation.judge.prompts import GRADE, RANK, RANK_SYSTEM, SELECT_BEGIN, SELECT_TURNS

Verdict = TypeVar("Verdict")

_TEMPERATURES = (0.0, 0.5, 1.0)
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+(?:\.\d+)?)\]")
_RANKED = re.compile(
    r"""["']?model["']?\s*:\s*["']?model_([12])["']?\s*,\s*["']?rank["']?\s*:\s*["']?([12])\b""", re.IGNORECASE
)
_CHOSEN = re.compile(r"response set\s*(\d+)", re.IGNORECASE)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


def judge_pairs(
    judge: Judge, samples: Sequence[Sample], items: Mapping[str, Item], opponents: Mapping[str, str]
) -> list[Sample]:
    """AlpacaEval: the samples with the share of both orders in which the judge ranks their reply above the opponent's.

    Args:
        judge: who ranks.
        samples: of AlpacaEval.
        items: by id.
        opponents: item -> the reply to compare with.

    Returns:
        The samples, in their order; one whose replies are still to be made has no score, one that is the opponent's
        own reply one half.
    """
    asked: list[tuple[str, str]] = []
    compared = []
    for sample in samples:
        if sample.item not in opponents:
            raise InputError(
                f"alpacaeval: nothing to compare {sample.item} with; give the file's rows an output "
                "(AlpacaEval's own references), or name the model to compare with"
            )
        mine, other = sample.replies[0], opponents[sample.item]
        if mine == other:
            continue
        instruction = items[sample.item].reference["instruction"]
        compared.append(sample)
        asked.append((RANK_SYSTEM, RANK.format(instruction=instruction, output_1=mine, output_2=other)))
        asked.append((RANK_SYSTEM, RANK.format(instruction=instruction, output_1=other, output_2=mine)))
    found = _verdicts(judge, asked, _winner, max_tokens=100)
    judged = {}
    for sample, first, second in zip(compared, found[::2], found[1::2], strict=True):
        wins = [_of(first, lambda winner: float(winner == 1)), _of(second, lambda winner: float(winner == 2))]
        judged[sample.model, sample.item] = _scored(sample, wins, 1.0, f"{first}, swapped {second}")
    return [
        judged.get((sample.model, sample.item)) or replace(sample, score=0.5, extracted="0.5", rule="the same reply")
        for sample in samples
    ]


def grade_chats(judge: Judge, samples: Sequence[Sample], items: Mapping[str, Item]) -> list[Sample]:
    """MT-Bench: the samples with the mean of both turns' grades, over 10.

    Args:
        judge: who grades.
        samples: of MT-Bench.
        items: by id.

    Returns:
        The samples, in their order; one whose replies are still to be made has no score.
    """
    asked = []
    for sample in samples:
        item = items[sample.item]
        names = {f"question_{turn}": text for turn, text in enumerate(item.turns, start=1)}
        names |= {f"answer_{turn}": text for turn, text in enumerate(sample.replies, start=1)}
        names |= {f"reference_{turn}": text for turn, text in enumerate(item.reference or (), start=1)}
        for turn in (1, 2):
            system, user = GRADE[turn, item.reference is not None]
            asked.append((system, user.format(**names)))
    found = _verdicts(judge, asked, find_rating, max_tokens=2048)
    return [
        _scored(sample, found[2 * place : 2 * place + 2], 10.0, f"turns {found[2 * place]} and {found[2 * place + 1]}")
        for place, sample in enumerate(samples)
    ]


def select_answers(
    judge: Judge, items: Sequence[Item], replies: Mapping[str, Mapping[str, Sequence[str]]], seed: int
) -> dict[str, str | None]:
    """Which model's reply the judge finds best (UltraFuser, table 11).

    Args:
        judge: who selects.
        items: of a benchmark.
        replies: model -> item -> one reply per turn; every model has every item.
        seed: of the order in which an item's replies are shown.

    Returns:
        item -> model; None where the judge's reply is still to be made, or names none.
    """
    orders: list[list[str]] = []
    asked: list[tuple[str, str]] = []
    for item in items:
        order = list(replies)
        random.Random(f"{seed} {item.id}").shuffle(order)
        orders.append(order)
        asked.append(("", selection_prompt(item.turns, [replies[model][item.id] for model in order])))
    found = _verdicts(judge, asked, find_choice, max_tokens=16)
    return {
        item.id: order[number - 1] if isinstance(number, int) and 1 <= number <= len(order) else None
        for item, order, number in zip(items, orders, found, strict=True)
    }


def selection_prompt(turns: Sequence[str], responses: Sequence[Sequence[str]]) -> str:
    """Table 11 for these turns and response sets."""
    several = SELECT_TURNS.format(turns=_NUMBERS[len(turns)]) if len(turns) > 1 else ""
    parts = [SELECT_BEGIN + several, "[Start of instruction]", "\n".join(turns), "[End of instruction]"]
    parts.append(f"Below are the {_NUMBERS[len(responses)]} responses.")
    for number, response in enumerate(responses, start=1):
        text = "\n".join(response)
        parts += [f"[Start of response set {number}]", text, f"[End of response set {number}]"]
    names = [f'"response set {number}"' for number in range(1, len(responses) + 1)]
    parts += ["Which response set is the best?", f"Output {', '.join(names[:-1])} or {names[-1]} directly."]
    return "\n".join(parts)


def find_rating(reply: str) -> float | None:
    """A grade from 1 to 10, by FastChat's two patterns."""
    found = _RATING.search(reply) or _RATING_BACKUP.search(reply)
    rating = float(found[1]) if found else 0.0
    return rating if 1 <= rating <= 10 else None


def find_choice(reply: str) -> int | None:
    """The one response set that a reply names."""
    numbers = {int(number) for number in _CHOSEN.findall(reply)}
    return numbers.pop() if len(numbers) == 1 else None


def _winner(reply: str) -> int | None:
    """1 or 2: the model with rank 1, where the other has not got it as well."""
    ranks = {int(model): int(rank) for model, rank in _RANKED.findall(reply)}
    first = [model for model, rank in ranks.items() if rank == 1]
    return first[0] if len(ranks) == 2 and len(first) == 1 else None


def _verdicts(
    judge: Judge, asked: Sequence[tuple[str, str]], read: Callable[[str], Verdict | None], max_tokens: int
) -> list[Verdict | str]:
    """The verdict on every (system, user); NO_VERDICT where no reply holds one, "" where a reply is to be made."""
    found: list[Verdict | str] = [NO_VERDICT] * len(asked)
    open_places = list(range(len(asked)))
    for temperature in _TEMPERATURES:
        settings = {"temperature": temperature, "max_tokens": max_tokens}
        requests = [
            Request(
                tuple((role, text) for role, text in zip(("system", "user"), asked[place], strict=True) if text),
                settings,
            )
            for place in open_places
        ]
        again = []
        for place, reply in zip(open_places, judge.replies(requests), strict=True):
            verdict = None if reply is None else read(reply)
            found[place] = verdict if verdict is not None else "" if reply is None else NO_VERDICT
            if reply is not None and verdict is None:
                again.append(place)
        open_places = again
    return found


def _of(verdict: int | str, value: Callable[[int], float]) -> float | str:
    return verdict if isinstance(verdict, str) else value(verdict)


def _scored(sample: Sample, verdicts: Sequence[float | str], most: float, rule: str) -> Sample:
    """With the mean of the verdicts that are numbers, over ``most``, once none is still to be made."""
    values = [value for value in verdicts if not isinstance(value, str)]
    if "" in verdicts:
        return replace(sample, score=None, extracted=None, rule="")
    if not values:
        return replace(sample, score=None, extracted=None, rule=NO_VERDICT)
    return replace(sample, score=fmean(values) / most, extracted=f"{fmean(values):g}", rule=rule)
