"""Many requests at once: whatever comes, goes or waits beside it, a request gets the tokens that it would get alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import asked, decode, engine_of, events_of, tokens_of
from support.release_prompts import random_ids

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.requests import Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling

pytestmark = pytest.mark.parametrize("trio", ["llamas"], indirect=True)

SETTINGS = [
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(0.8, top_k=20, seed=4),
    Sampling(1.2, top_p=0.9, min_p=0.01, seed=5),
    Sampling(repetition_penalty=1.3),
    Sampling(1.0, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={7: 2.0}, seed=6),
]
EOS = frozenset(range(3, 40))  # about a tenth of all tokens, so that answers end at different lengths


def mixed(model: Any, count: int, seed: int = 0) -> list[Request]:
    """Requests of any length, some of which begin alike."""
    source = random.Random(seed)
    beginnings = [[], [], random_ids(40, seed=1), random_ids(25, seed=2)]
    requests = []
    for row in range(count):
        beginning = source.choice(beginnings)
        prompt = {
            name: [*beginning, *random_ids(source.randint(1, 30), seed=1000 * row + place)]
            for place, name in enumerate(model.names)
        }
        requests += asked([prompt], source.randint(1, 25), source.choice(SETTINGS), EOS, first_row=row)
    return requests


def alone(model: Any, requests: list[Request]) -> dict[int, list[int]]:
    """Row -> its tokens, from an engine that answers one at a time and drafts nothing."""
    engine = engine_of(model, rows=1)
    return {int(request.id): tokens_of(events_of(engine, [request]))[int(request.id)] for request in requests}


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_mixed_requests_get_the_same_tokens_at_any_concurrency_with_and_without_drafts(model: Any, count: int) -> None:
    requests = mixed(model, count)
    expected = alone(model, requests)
    for rows, draft in ((1, 3), (8, 0), (8, 3), (32, 0), (32, 3))[:: 1 if count > 100 else 2]:
        engine = engine_of(model, rows=rows, draft=draft, chunk=64)
        assert tokens_of(events_of(engine, requests)) == expected, (rows, draft)
        stats = engine.stats()
        assert stats.free == stats.total
        assert (stats.drafted > 0) == (draft > 0) and stats.tokens == sum(map(len, expected.values()))


@pytest.mark.parametrize("chunk", [64, 20])
def test_a_prompt_whose_beginning_is_known_is_read_beside_a_longer_new_one(model: Any, chunk: int) -> None:
    beginning = random_ids(5, seed=1)
    first, short = ([*beginning, *random_ids(3, seed=seed)] for seed in (2, 3))
    prompts = [dict.fromkeys(model.names, ids) for ids in (first, short, random_ids(40, seed=4))]
    requests = asked(prompts, 4)
    expected = alone(model, requests)
    engine = engine_of(model, chunk=chunk)
    events = events_of(engine, requests[:1])
    assert tokens_of(events + events_of(engine, requests[1:])) == expected
    assert set(engine.stats().prefix_hits.values()) == {5}


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 11)),
        st.tuples(st.just("cancel"), st.integers(0, 11)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    min_size=5,
    max_size=40,
)


@pytest.fixture(scope="module")
def twelve(models: Any) -> Iterator[tuple[list[Request], dict[int, list[int]]]]:
    requests = mixed(models["llamas"], 12, seed=9)
    yield requests, alone(models["llamas"], requests)


@given(actions=ACTIONS, draft=st.integers(0, 3), tokens=st.integers(130, 400))
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrivals_and_cancellations_in_any_order_change_no_other_answer(
    models: Any, trio: str, twelve: Any, actions: Any, draft: int, tokens: int
) -> None:
    requests, expected = twelve
    engine = engine_of(models[trio], rows=5, draft=draft, tokens=tokens, chunk=32)
    found: dict[int, list[int]] = {}
    under_way: set[int] = set()

    def step() -> None:
        for event in engine.step():
            assert isinstance(event, TokenEvent)
            assert int(event.id) in under_way
            found[int(event.id)].append(event.token)
            if event.finish:
                under_way.remove(int(event.id))
                assert found[int(event.id)] == expected[int(event.id)]

    for action, number in actions:
        if action == "submit" and number not in under_way:
            engine.submit(requests[number])
            under_way.add(number)
            found[number] = []
        elif action == "cancel":
            engine.cancel(str(number))
            under_way.discard(number)
        else:
            for _ in range(number if action == "step" else 0):
                step()
        for row, answer in found.items():
            assert answer == expected[row][: len(answer)]
    while not engine.idle:
        step()
    stats = engine.stats()
    assert not under_way and stats.free == stats.total and stats.running == stats.waiting == 0


def test_a_cancelled_request_frees_its_room_at_once_wherever_it_is(model: Any) -> None:
    engine = engine_of(model, rows=3, tokens=400, chunk=16)
    requests = asked([{name: random_ids(60, seed=row) for name in model.names} for row in range(5)], 30)
    for request in requests:
        engine.submit(request)
    while not engine.step():
        pass  # until the first answer has begun; others are read or wait
    assert engine.stats().running == 3 and engine.stats().waiting == 2
    for row in (4, 0, 1, 2, 3):
        engine.cancel(str(row))
        engine.cancel(str(row))
    stats = engine.stats()
    assert engine.idle and stats.free == stats.total and not engine.step()
    assert decode(engine, [requests[1].prompt], 30) == decode(engine_of(model), [requests[1].prompt], 30)


def test_requests_wait_until_every_specialist_has_room_and_then_get_the_same_tokens(model: Any) -> None:
    prompts = [
        {name: random_ids(30, seed=10 * row + place) for place, name in enumerate(model.names)} for row in range(6)
    ]
    expected = decode(engine_of(model), prompts, 20)
    engine = engine_of(model, rows=6, tokens=120)  # two of them need 49 each
    for request in asked(prompts, 20):
        engine.submit(request)
    events = []
    most = 0
    while not engine.idle:
        events += engine.step()
        most = max(most, engine.stats().running)
        assert all(0 <= free <= 120 for free in engine.stats().free.values())
    assert tokens_of(events) == expected and most == 2


def test_a_request_that_could_never_fit_is_refused_by_the_option_that_helps(model: Any) -> None:
    engine = engine_of(model, tokens=50)
    prompt = {name: random_ids(30, seed=0) for name in model.names}
    decode(engine, [prompt], 21)  # the last token is never read
    with pytest.raises(
        InputError, match="a prompt of 30 tokens for text and an answer of 22 do not fit into the 50 tok"
    ):
        engine.submit(asked([prompt], 22)[0])
    with pytest.raises(InputError, match=r"token 99999: the vocabulary has 0 to \d+"):
        engine.submit(asked([{name: [99999] for name in model.names}], 2)[0])


def test_answers_go_on_beside_a_long_prompt_and_short_prompts_pass_it(model: Any) -> None:
    engine = engine_of(model, chunk=16)
    short = {name: random_ids(5, seed=1) for name in model.names}
    long = {name: random_ids(200, seed=2) for name in model.names}
    engine.submit(asked([short], 40)[0])
    engine.step()
    engine.submit(asked([long], 2, first_row=1)[0])
    engine.submit(asked([short], 2, first_row=2)[0])
    first: dict[str, int] = {}
    for step in range(1, 40):
        events = engine.step()
        if "1" in first:
            break
        assert "0" in {event.id for event in events}  # a token in every step
        for event in events:
            first.setdefault(event.id, step)
    assert first["2"] <= 2 and first["1"] >= 200 / 16


def test_what_is_kept_gives_way_to_requests_and_is_found_while_there_is_room(model: Any) -> None:
    engine = engine_of(model, rows=1, tokens=100)
    prompts = [{name: random_ids(40, seed=row) for name in model.names} for row in range(3)]
    expected = [decode(engine_of(model), [prompt], 5)[0] for prompt in prompts]
    hits = []
    for number in (0, 1, 1, 0, 2, 0):
        before = engine.stats().prefix_hits["text"]
        assert decode(engine, [prompts[number]], 5)[0] == expected[number]
        hits.append(engine.stats().prefix_hits["text"] - before)
    assert hits[:4] == [0, 0, 39, 39] and hits[4] == 0 and hits[5] == 39
