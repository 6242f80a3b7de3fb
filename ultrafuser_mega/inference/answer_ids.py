"""Answers to prompts of token ids, as token ids: what a training run asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.embedded import Serving, text_engine
from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.inference.requests import FailedEvent, Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling


def answer_ids(
    model: str,
    prompts: Mapping[int, tuple[Mapping[str, Sequence[int]], int]],
    *,
    temperature: float,
    seed: int,
    device: torch.device,
    go_on: Callable[[], None] = lambda: None,
) -> dict[int, list[int]]:
    """Row -> its answer, the ending token included, if it came.

    Args:
        model: see ``address``; it is in memory for as long as this takes.
        prompts: row -> ids for every specialist, and the most tokens of the answer.
        temperature: 0 for the likeliest tokens.
        seed: of the draws, with the row.
        device: of all specialists.
        go_on: called after every step of the engine.

    Raises:
        InputError: there is no such model, a prompt does not fit, or the model gave no number.
    """
    answers: dict[int, list[int]] = {row: [] for row in prompts}
    if not prompts:
        return answers
    with opened_model(model, str(device), None) as opened, torch.no_grad():
        engine = text_engine(opened, Serving(draft=0)).engine
        sampling = Sampling(temperature=temperature, seed=seed)
        for row, (ids, most) in prompts.items():
            engine.submit(Request(str(row), ids, sampling, most, opened.eos, row))
        while not engine.idle:
            for event in engine.step():
                if isinstance(event, FailedEvent):
                    raise InputError(event.message)
                if isinstance(event, TokenEvent):
                    answers[int(event.id)].append(event.token)
            go_on()
    return answers
