"""Guesses at what comes next: free to make, and nothing depends on whether they are right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import asked, decode, engine_of, events_of, tokens_of
from support.release_prompts import of_row, random_ids

from ultrafuser_mega.inference.guesses import Guesses
from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.inference.requests import TokenEvent
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.underway import Underway

EOS = frozenset(range(3, 20))


def test_what_followed_the_same_two_tokens_last_is_guessed_or_else_the_same_one() -> None:
    guesses = Guesses()
    guesses.add([1, 2, 3, 4, 1, 2, 5, 9, 2, 7])
    assert guesses.behind([1, 2], 3) == [5, 9, 2]  # the latest place of both
    assert guesses.behind([8, 2], 2) == [7]  # the latest of the one; the sequence ends there
    assert guesses.behind([9], 1) == [2] and guesses.behind([8], 4) == []
    guesses.add([1])
    assert guesses.behind([], 2) == [2, 5] and guesses.behind([2], 1) == [5]  # of the sequence's own end
    assert Guesses().behind([], 3) == []


def test_guesses_are_those_of_a_search_from_the_end() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(5) for _ in range(draw.randrange(1, 30))]
        more = [draw.randrange(6) for _ in range(draw.randrange(4))]
        guesses = Guesses()
        guesses.add(ids[:4])
        guesses.add(ids[4:])
        end = [*ids, *more][-2:]
        expected: list[int] = []
        for size in (2, 1):
            ends = [at for at in range(size, len(ids)) if ids[at - size : at] == end[-size:]]
            if ends and len(end) >= size:
                expected = ids[ends[-1] : ends[-1] + 3]
                break
        assert guesses.behind(more, 3) == expected


@pytest.fixture(params=["fused", "alone"])
def answering(request: pytest.FixtureRequest, model: Any, release: Path) -> Iterator[Any]:
    """The fused model, and one of its specialists."""
    if request.param == "fused":
        yield model
        return
    with opened_model(f"{release}@math", "cpu", None) as opened:
        yield opened.model


@pytest.mark.parametrize("trio", ["llamas"], indirect=True)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3), Sampling(repetition_penalty=1.3)])
def test_answers_are_the_same_whatever_is_guessed(
    answering: Any, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    model = answering
    prompts = [{name: of_row(row)[name] for name in model.names} for row in range(3)]
    requests = asked(prompts, 14, sampling, EOS)
    expected = tokens_of(events_of(engine_of(model), requests))
    draw = random.Random(0)

    def some(self: Underway, most: int) -> list[int]:
        """Right ones, wrong ones and none, as many as there may be."""
        known = expected[int(self.request.id)][len(self.answer) + len(self.drafts) :]
        right = draw.randint(0, most)
        found = [*known[:right], *random_ids(most, seed=draw.randrange(99))][: draw.randint(0, most)]
        return [token for token in found if token not in EOS]

    def none(self: Underway, most: int) -> list[int]:
        return []

    for draft in (1, 2, 4, 8):
        for guess in (some, none, Underway.guess):
            monkeypatch.setattr(Underway, "guess", guess)
            for rows in (1, 3):
                assert tokens_of(events_of(engine_of(model, rows=rows, draft=draft), requests)) == expected
            monkeypatch.undo()


@pytest.mark.parametrize("trio", ["llamas"], indirect=True)
def test_what_is_told_of_a_token_is_the_same_if_it_was_guessed(
    answering: Any, monkeypatch: pytest.MonkeyPatch, close: Any
) -> None:
    prompts = [{name: of_row(row % 3)[name] for name in answering.names} for row in range(4)]
    bias = dict.fromkeys(range(20, 60), -3.0) | {77: 4.0}
    settings = [
        Sampling(logit_bias=bias, frequency_penalty=0.7),
        Sampling(0.8, seed=-5, top_k=50, presence_penalty=1.5),
        Sampling(1.2, seed=2**62, min_p=0.01, logit_bias=bias),
        Sampling(),
    ]
    lengths = [14, 1, 9, 2]
    requests = asked(prompts, lengths, settings, EOS, top_logprobs=3)
    expected = [event for event in events_of(engine_of(answering), requests) if isinstance(event, TokenEvent)]
    known = tokens_of(expected)
    assert len(known[0]) > 5 and len(known[1]) == 1
    # Right at first, wrong behind every third token.
    monkeypatch.setattr(
        Underway,
        "guess",
        lambda self, most: [
            token if len(self.answer) % 3 + at < 4 else 77
            for at, token in enumerate(known[self.request.row][len(self.answer) + len(self.drafts) :][:most])
            if token not in EOS
        ],
    )
    engine = engine_of(answering, draft=8)
    found = [event for event in events_of(engine, requests) if isinstance(event, TokenEvent)]
    assert 0 < engine.stats().accepted < engine.stats().drafted
    for row in known:
        for one, other in zip(*([e for e in of if e.id == str(row)] for of in (expected, found)), strict=True):
            assert (one.token, one.finish) == (other.token, other.finish)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            numbers = ([e.logprob, *e.weights, *(p for _, p in e.top)] for e in (one, other))
            torch.testing.assert_close(*map(torch.tensor, numbers), **close)


@pytest.mark.parametrize("trio", ["llamas"], indirect=True)
def test_the_leader_reads_what_it_would_draft_in_fewer_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, new = of_row(1), 21
    plain = engine_of(model, draft=4, adapt=False)
    drafted = decode(plain, [prompt], new)
    known = drafted[0]
    monkeypatch.setattr(
        Underway, "guess", lambda self, most: known[len(self.answer) + len(self.drafts) :][: min(most, 9)]
    )
    told = engine_of(model, draft=4, adapt=False)
    assert decode(told, [prompt], new) == drafted
    passes = [sum(engine.stats().passes.values()) for engine in (plain, told)]
    assert passes[1] < passes[0]
    # A leader that agrees and is told all of it takes 1 pass for its drafts, and 3 specialists take 3 passes a round.
    accepted = told.stats().accepted / told.stats().drafted
    assert passes[1] >= 3 * (new - 1) / 5 and (accepted < 1 or passes[1] == 3 * (new - 1) / 5)


@pytest.mark.parametrize("trio", ["llamas"], indirect=True)
def test_a_model_alone_reads_right_guesses_in_one_pass(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = 21
    with opened_model(f"{release}@math", "cpu", None) as opened:
        prompt = {"math": of_row(1)["math"]}
        plain = engine_of(opened.model)
        known = decode(plain, [prompt], new)
        monkeypatch.setattr(Underway, "guess", lambda self, most: known[0][len(self.answer) :][:most])
        told = engine_of(opened.model, draft=4)
        assert decode(told, [prompt], new) == known
    assert plain.stats().passes == {"math": new - 1}  # the first token is of the prompt's pass
    assert told.stats().passes == {"math": (new - 1) // 5} and told.stats().accepted == 4 * (new - 1) // 5
