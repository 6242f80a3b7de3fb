"""Rows of the table that no model gave: the best of several models' answers, by their scores or by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Sample
from ultrafuser_mega.evaluation.judge import Judge, select_answers
from ultrafuser_mega.evaluation.run import Task

ORACLE, SELECTED = "oracle of {}", "selected of {}"


def oracle_row(samples: Sequence[Sample], models: Sequence[str]) -> list[Sample]:
    """Of every item the answer with the best score: what routing samples among ``models`` could reach at most.

    Args:
        samples: of these models and others.
        models: the rows that are chosen from.

    Raises:
        InputError: there is no such row.
    """
    answers = _by_item(samples, models)
    best = [max(own, key=lambda sample: -1.0 if sample.score is None else sample.score) for own in answers.values()]
    return [replace(sample, model=ORACLE.format(", ".join(models))) for sample in best]


def selected_row(
    samples: Sequence[Sample], models: Sequence[str], tasks: Sequence[Task], judge: Judge, seed: int
) -> list[Sample]:
    """Of every item the answer that the judge finds best (paper, table 11); not yet judged ones have no score.

    Raises:
        InputError: there is no such row, or the judge cannot be asked.
    """
    answers = _by_item(samples, models)
    row = []
    for task in tasks:
        replies: Mapping[str, dict[str, Sequence[str]]] = {model: {} for model in models}
        for (benchmark, item), own in answers.items():
            if benchmark == task.benchmark.name:
                for sample in own:
                    replies[sample.model][item] = sample.replies
        chosen = select_answers(judge, task.items, replies, seed)
        for item, model in chosen.items():
            own = answers[task.benchmark.name, item]
            sample = next((one for one in own if one.model == model), replace(own[0], score=None, rule="not selected"))
            row.append(replace(sample, model=SELECTED.format(", ".join(models))))
    return row


def _by_item(samples: Sequence[Sample], models: Sequence[str]) -> dict[tuple[str, str], list[Sample]]:
    """(benchmark, item) -> the answers of ``models``, in this order."""
    known = {sample.model for sample in samples}
    for model in models:
        if model not in known:
            raise InputError(f"no row {model!r}; expected some of {', '.join(sorted(known))}")
    found: dict[tuple[str, str], list[Sample]] = {}
    for model in models:
        for sample in samples:
            if sample.model == model:
                found.setdefault((sample.benchmark, sample.item), []).append(sample)
    return found
