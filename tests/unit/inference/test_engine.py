"""The engine's answers against a float64 loop without cache or batch, and against transformers' ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import Alternating, asked, decode, engine_of, events_of, tokens_of
from support.release_prompts import STEPS, batch, of_row, response

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.requests import FailedEvent, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling

ROWS = [of_row(row) for row in range(3)]


@pytest.mark.parametrize("draft", [0, 3])
def test_single_and_batched_prompts_of_different_lengths_give_the_text_of_a_loop_without_cache(
    model: Any, reference: Any, draft: int
) -> None:
    expected = {row: reference.greedy(prompt, STEPS) for row, prompt in enumerate(ROWS)}
    assert decode(engine_of(model, draft=draft), ROWS) == expected
    assert {row: decode(engine_of(model, draft=draft), [prompt])[0] for row, prompt in enumerate(ROWS)} == expected


def test_the_text_is_that_of_generate(model: Any) -> None:
    inputs = batch()
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None)
    assert list(decode(engine_of(model), ROWS).values()) == response(sequences, inputs)


def test_gate_weights_are_those_behind_each_token(model: Any, reference: Any, close: Any) -> None:
    events = events_of(engine_of(model, draft=2), asked([ROWS[1]], 4))
    answer = [event.token for event in events]
    whole = {name: [*prompt, *answer[:-1]] for name, prompt in ROWS[1].items()}
    expected = reference(whole, 4)[1]
    found = torch.tensor([event.weights for event in events])
    torch.testing.assert_close(found.double(), expected, **close)


def test_log_probabilities_are_those_of_the_fused_distribution_before_filters(
    model: Any, reference: Any, close: Any
) -> None:
    drawn = Sampling(temperature=0.7, top_k=5, seed=2)
    events = events_of(engine_of(model, draft=2), asked([ROWS[1]], 4, drawn, top_logprobs=3))
    answer = [event.token for event in events]
    whole = {name: [*prompt, *answer[:-1]] for name, prompt in ROWS[1].items()}
    expected = reference(whole, 4)[0].log_softmax(-1)
    tolerance = {"atol": 2 * close["atol"], "rtol": 0.0}
    for event, likely in zip(events, expected, strict=True):
        best = likely.topk(3)
        torch.testing.assert_close(torch.tensor(event.logprob).double(), likely[event.token], **tolerance)
        assert [token for token, _ in event.top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in event.top]).double(), best.values, **tolerance)


def test_log_probabilities_of_a_raw_prompt_are_those_of_the_fused_distribution(
    model: Any, reference: Any, close: Any
) -> None:
    prompt = dict.fromkeys(model.names, ROWS[0]["code"])
    first, *_ = events_of(engine_of(model, chunk=4), asked([prompt], 2, top_logprobs=2, prompt_logprobs=True))
    ids = prompt["code"]
    expected = reference(dict.fromkeys(ids_of(prompt), ids[:-1]), len(ids) - 1)[0].log_softmax(-1)
    assert first.tokens[0] is None
    for token, found, likely in zip(ids[1:], first.tokens[1:], expected, strict=True):
        tolerance = {"atol": 2 * close["atol"], "rtol": 0.0}
        torch.testing.assert_close(torch.tensor(found.logprob).double(), likely[token], **tolerance)
        assert [best for best, _ in found.top] == likely.topk(2).indices.tolist()


def ids_of(prompt: Any) -> list[str]:
    return list(prompt)


def test_rows_leave_at_eos_and_the_others_go_on_unchanged(model: Any, reference: Any) -> None:
    free = [reference.greedy(prompt, STEPS) for prompt in ROWS]
    eos = free[1][3]
    events = events_of(engine_of(model), asked(ROWS, eos=[eos], first_row=5))
    assert tokens_of(events) == {5 + row: reference.greedy(prompt, STEPS, eos=eos) for row, prompt in enumerate(ROWS)}
    ends = {event.id: event.finish for event in events if event.finish}
    assert ends["6"] == "eos" and len(ends) == 3


@pytest.mark.parametrize(("rule", "draft"), [("gate", 0), ("gate", 2), ("held", 2), ("btm", 0)])
def test_prompts_that_enter_a_running_batch_are_answered_as_if_alone(model: Any, rule: str, draft: int) -> None:
    prompts = [ROWS[row] for row in (2, 0, 1, 1, 2, 0, 1)]
    alone = {row: decode(engine_of(model, rule), [prompt])[0] for row, prompt in enumerate(prompts)}
    eos = {answer[2] for answer in list(alone.values())[:2]}  # rows leave at different steps
    cut = {row: until(answer, eos) for row, answer in alone.items()}
    for rows in (2, 3, 16):
        assert decode(engine_of(model, rule, rows, draft=draft), prompts, eos=eos) == cut


def until(answer: list[int], eos: set[int]) -> list[int]:
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in eos), answer)


def test_no_more_rows_than_wanted_are_under_way(model: Any) -> None:
    engine = engine_of(model, rows=4)
    for request in asked([*ROWS, *ROWS], 4):
        engine.submit(request)
    while not engine.idle:
        engine.step()
        assert engine.stats().running <= 4


class FedTokens:
    """Counts the tokens that every reading of prompts is given."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[dict[str, list[int]]] = []
        read = engine.lanes.read

        def counted(spans: Any) -> Any:
            self.counts.append({name: [count for _, count in rows] for name, rows in spans.items()})
            return read(spans)

        monkeypatch.setattr(engine.lanes, "read", counted)


@pytest.mark.parametrize("draft", [0, 2])
def test_the_next_turn_of_a_conversation_reads_only_what_is_new(
    model: Any, monkeypatch: pytest.MonkeyPatch, draft: int
) -> None:
    engine = engine_of(model, draft=draft)
    answer = decode(engine, [ROWS[0]])[0]
    turn = {name: [*prompt, *answer, 7, 8, 9] for name, prompt in ROWS[0].items()}
    fed = FedTokens(engine, monkeypatch)
    second = decode(engine, [turn])[0]
    assert fed.counts[0] == {name: [4] for name in model.names}  # the last answer's last token was never read
    assert second == decode(engine_of(model), [turn])[0]


def test_a_conversation_that_takes_another_way_keeps_what_is_common(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model)
    answer = decode(engine, [ROWS[0]])[0]
    other = {name: [*prompt, *answer[:3], 5, 6] for name, prompt in ROWS[0].items()}
    fed = FedTokens(engine, monkeypatch)
    assert decode(engine, [other])[0] == decode(engine_of(model), [other])[0]
    assert fed.counts[0] == {name: [2] for name in model.names}


def test_what_prompts_begin_with_is_read_once_though_they_come_together(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    preamble = ROWS[2]["math"] + ROWS[0]["code"]
    prompts = [{name: [*preamble, *ids] for name, ids in row.items()} for row in ROWS]
    engine = engine_of(model)
    fed = FedTokens(engine, monkeypatch)
    assert decode(engine, prompts, 2) == {row: decode(engine_of(model), [p], 2)[0] for row, p in enumerate(prompts)}
    tokens = sum(sum(rows) for counts in fed.counts for rows in counts.values())
    prompt_tokens = len(model.names) * len(preamble) + sum(len(ids) for row in ROWS for ids in row.values())
    # Each answer's first token; a prompt's last token is always read.
    assert tokens <= prompt_tokens + 3 * len(model.names) + 3 * len(model.names)
    assert sum(engine.stats().prefix_hits.values()) >= 2 * len(model.names) * len(preamble) - 6


def test_the_same_prompt_again_gives_the_same_text(model: Any) -> None:
    engine = engine_of(model)
    assert decode(engine, [ROWS[2]]) == decode(engine, [ROWS[2]])


@pytest.mark.parametrize("after", [0, 3])
def test_an_answer_that_was_interrupted_half_way_leaves_nothing_wrong_behind(
    model: Any, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    engine = engine_of(model)
    calls = 0
    last_hidden = model.last_hidden

    def interrupted(name: Any, ids: Any, mask: Any = None, cache: Any = None) -> Any:
        nonlocal calls
        calls += name == "math"
        if calls == after + 1:
            raise KeyboardInterrupt
        return last_hidden(name, ids, mask, cache)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "last_hidden", interrupted)
        decode(engine, [ROWS[0]])
    assert engine.idle
    assert decode(engine, [ROWS[0]]) == decode(engine_of(model), [ROWS[0]])


def test_answers_end_where_the_positions_of_a_specialist_end(model: Any) -> None:
    prompt = {name: [5] * 20 for name in model.names} | {"code": [5] * 250}
    positions = model.config.specialist_config("code").max_position_embeddings
    found = decode(engine_of(model, draft=3), [prompt, ROWS[0]], 20)  # one row's end is not the other's
    assert [len(found[row]) for row in range(2)] == [positions - 250, 20]
    with pytest.raises(InputError, match=rf"the prompt has {positions} tokens for code, which reads {positions} at mo"):
        decode(engine_of(model), [prompt | {"code": [5] * positions}])


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_generate(model: Any, penalty: float) -> None:
    inputs = batch(rows=(1,))
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None, repetition_penalty=penalty)
    found = decode(engine_of(model, draft=2), [ROWS[1]], sampling=Sampling(repetition_penalty=penalty))
    assert found[0] == response(sequences, inputs)[0]


def test_draws_follow_the_seed_and_the_row_not_the_batch(model: Any) -> None:
    drawn = Sampling(temperature=1.0, seed=3, repetition_penalty=1.3)
    together = decode(engine_of(model), ROWS, sampling=drawn)
    alone = {
        row: decode(engine_of(model), [prompt], sampling=drawn, first_row=row)[row] for row, prompt in enumerate(ROWS)
    }
    assert together == alone
    assert together != decode(engine_of(model), ROWS, sampling=Sampling(temperature=1.0, seed=4))
    same = decode(engine_of(model), [ROWS[0]] * 3, sampling=drawn)
    assert len({tuple(answer) for answer in same.values()}) == 3


@pytest.mark.parametrize("only_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_drawing_among_the_single_best_token_is_greedy(model: Any, only_best: Any) -> None:
    drawn = Sampling(temperature=5.0, **only_best)
    assert decode(engine_of(model), ROWS, sampling=drawn) == decode(engine_of(model), ROWS)


def test_draws_have_the_probabilities_of_the_filtered_softmax(model: Any) -> None:
    """1500 first tokens among the 3 likeliest: each count within 5 standard deviations of its expectation."""
    engine = engine_of(model, rows=64)
    tokens = [row[0] for row in decode(engine, [ROWS[0]] * 1500, 1, Sampling(2.0, top_k=3)).values()]
    ids = {name: torch.tensor([prompt]) for name, prompt in ROWS[0].items()}
    with torch.no_grad():
        logits = model(specialist_input_ids=ids, logits_to_keep=1).logits[0, -1]
    best = logits.topk(3)
    for token, p in zip(best.indices.tolist(), (best.values / 2).softmax(-1).tolist(), strict=True):
        assert abs(tokens.count(token) - 1500 * p) < 5 * (1500 * p * (1 - p)) ** 0.5
    assert set(tokens) <= set(best.indices.tolist())


def test_a_constraint_masks_every_choice_and_hears_of_every_token(model: Any) -> None:
    constraint = Alternating()
    events = events_of(engine_of(model, draft=3), asked([ROWS[0]], constraint=constraint))
    tokens = tokens_of(events)[0]
    assert tokens == constraint.heard
    assert [token % 2 for token in tokens] == [1, 0] * (STEPS // 2)


def test_a_row_whose_numbers_are_none_fails_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = next(token for token in range(3, 300) if not any(token in ids for row in ROWS for ids in row.values()))
    last_hidden = model.last_hidden

    def broken(name: Any, ids: Any, mask: Any = None, cache: Any = None) -> Any:
        hidden = last_hidden(name, ids, mask, cache)
        return hidden.masked_fill((ids == poisoned).any(1)[:, None, None], float("nan"))

    monkeypatch.setattr(model, "last_hidden", broken)
    prompts = [ROWS[0], {name: [*ids, poisoned] for name, ids in ROWS[1].items()}, ROWS[2]]
    biased = [Sampling(logit_bias={poisoned: -1e9})] * 3  # no answer of the others says it
    engine = engine_of(model)
    events = events_of(engine, asked(prompts, sampling=biased))
    failed = [event for event in events if isinstance(event, FailedEvent)]
    assert [event.id for event in failed] == ["1"] and "logits are not finite" in failed[0].message
    whole = decode(engine_of(model), [ROWS[0], ROWS[1], ROWS[2]], sampling=biased)
    found = tokens_of([event for event in events if isinstance(event, TokenEvent)])
    assert found == {row: whole[row] for row in (0, 2)}
    stats = engine.stats()
    assert stats.free == stats.total
