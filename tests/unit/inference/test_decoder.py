"""The decoder's answers against a float64 loop without cache or batch, and against transformers' ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.release_prompts import STEPS, batch, of_row, response

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.decoder import Decoder
from ultrafuser_mega.inference.mixing import RULES
from ultrafuser_mega.inference.sampling import Sampling

GREEDY = Sampling()
ROWS = [of_row(row) for row in range(3)]


def decode(
    decoder: Decoder, prompts: Any, steps: Any = STEPS, sampling: Any = GREEDY, eos: Any = (), **options: Any
) -> dict[int, list[int]]:
    """Row -> its tokens."""
    answers: dict[int, list[int]] = {}
    for step in decoder.decode(prompts, max_new_tokens=steps, sampling=sampling, eos=eos, **options):
        for row, token in zip(step.rows, step.tokens, strict=True):
            answers.setdefault(row, []).append(token)
    return answers


def test_single_and_batched_prompts_of_different_lengths_give_the_text_of_a_loop_without_cache(
    model: Any, reference: Any
) -> None:
    expected = {row: reference.greedy(prompt, STEPS) for row, prompt in enumerate(ROWS)}
    assert decode(Decoder(model), ROWS) == expected
    assert {row: decode(Decoder(model), [prompt])[0] for row, prompt in enumerate(ROWS)} == expected


def test_the_text_is_that_of_generate(model: Any) -> None:
    inputs = batch()
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None)
    assert list(decode(Decoder(model), ROWS).values()) == response(sequences, inputs)


def test_gate_weights_are_those_behind_each_token(model: Any, reference: Any, close: Any) -> None:
    decoding = Decoder(model).decode([ROWS[1]], max_new_tokens=4, sampling=GREEDY, eos=())
    steps = list(decoding)
    answer = [step.tokens[0] for step in steps]
    whole = {name: [*prompt, *answer[:-1]] for name, prompt in ROWS[1].items()}
    expected = reference(whole, 4)[1]
    torch.testing.assert_close(torch.cat([step.weights for step in steps]).double(), expected, **close)


def test_rows_leave_the_batch_at_eos_and_the_others_go_on_unchanged(model: Any, reference: Any) -> None:
    free = [reference.greedy(prompt, STEPS) for prompt in ROWS]
    eos = free[1][3]
    sizes = []
    answers: dict[int, list[int]] = {}
    for step in Decoder(model).decode(ROWS, max_new_tokens=STEPS, sampling=GREEDY, eos=[eos], first_row=5):
        sizes.append(len(step.rows))
        for row, token in zip(step.rows, step.tokens, strict=True):
            answers.setdefault(row, []).append(token)
    assert answers == {5 + row: reference.greedy(prompt, STEPS, eos=eos) for row, prompt in enumerate(ROWS)}
    assert sizes[0] == 3 and min(sizes) < 3


@pytest.mark.parametrize("rule", ["gate", "btm"])
def test_prompts_that_enter_a_running_batch_are_answered_as_if_alone(model: Any, rule: str) -> None:
    prompts = [ROWS[row] for row in (2, 0, 1, 1, 2, 0, 1)]
    alone = {
        row: decode(Decoder(model, RULES[rule]), [prompt], first_row=row)[row] for row, prompt in enumerate(prompts)
    }
    eos = {answer[2] for answer in list(alone.values())[:2]}  # rows leave at different steps
    cut = {row: _until(answer, eos) for row, answer in alone.items()}
    for at_once in (2, 3):
        assert decode(Decoder(model, RULES[rule]), prompts, eos=eos, at_once=at_once) == cut


def test_draws_do_not_depend_on_who_else_is_in_the_batch(model: Any) -> None:
    drawn = Sampling(temperature=1.0, seed=3, repetition_penalty=1.3)
    together = decode(Decoder(model), [*ROWS, *ROWS], sampling=drawn)
    assert decode(Decoder(model), [*ROWS, *ROWS], sampling=drawn, at_once=2) == together


def test_no_more_rows_than_wanted_are_under_way(model: Any) -> None:
    steps = Decoder(model).decode([*ROWS, *ROWS], max_new_tokens=4, sampling=GREEDY, eos=(), at_once=4)
    assert [len(step.rows) for step in steps] == [4, 4, 4, 4, 2, 2, 2, 2]


def _until(answer: list[int], eos: set[int]) -> list[int]:
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in eos), answer)


def test_a_row_that_was_ended_gets_no_further_token(model: Any) -> None:
    decoding = Decoder(model).decode(ROWS, max_new_tokens=STEPS, sampling=GREEDY, eos=())
    rows = []
    for step in decoding:
        rows.append(step.rows)
        if len(rows) == 2:
            decoding.end_row(0)
    assert rows == [[0, 1, 2]] * 2 + [[1, 2]] * (STEPS - 2)


class FedTokens:
    """Counts the tokens that every forward pass is given."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[dict[str, int]] = []
        forward = decoder.lanes.forward

        def counted(rows: Any) -> Any:
            self.counts.append({name: part.shape[1] for name, part in rows.next.items()})
            return forward(rows)

        monkeypatch.setattr(decoder.lanes, "forward", counted)


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(model)
    answer = decode(decoder, [ROWS[0]])[0]
    turn = {name: [*prompt, *answer, 7, 8, 9] for name, prompt in ROWS[0].items()}
    fed = FedTokens(decoder, monkeypatch)
    second = decode(decoder, [turn])[0]
    assert fed.counts[0] == dict.fromkeys(model.names, 4)  # the last answer's last token was never read
    assert second == decode(Decoder(model), [turn])[0]


def test_a_conversation_that_takes_another_way_keeps_what_is_common(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(model)
    answer = decode(decoder, [ROWS[0]])[0]
    other = {name: [*prompt, *answer[:3], 5, 6] for name, prompt in ROWS[0].items()}
    fed = FedTokens(decoder, monkeypatch)
    assert decode(decoder, [other])[0] == decode(Decoder(model), [other])[0]
    assert fed.counts[0] == dict.fromkeys(model.names, 2)


def test_the_same_prompt_again_gives_the_same_text(model: Any) -> None:
    decoder = Decoder(model)
    assert decode(decoder, [ROWS[2]]) == decode(decoder, [ROWS[2]])


def test_a_batch_between_two_turns_does_no_harm(model: Any) -> None:
    decoder = Decoder(model)
    first = decode(decoder, [ROWS[0]])
    decode(decoder, ROWS, steps=2)
    assert decode(decoder, [ROWS[0]]) == first


@pytest.mark.parametrize("after", [0, 3])
def test_an_answer_that_was_interrupted_half_way_leaves_nothing_wrong_behind(
    model: Any, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    decoder = Decoder(model)
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
        decode(decoder, [ROWS[0]])
    assert decode(decoder, [ROWS[0]]) == decode(Decoder(model), [ROWS[0]])


def test_answers_end_where_the_positions_of_a_specialist_end(model: Any) -> None:
    prompt = {name: [5] * 20 for name in model.names} | {"code": [5] * 250}
    positions = model.config.specialist_config("code").max_position_embeddings
    found = decode(Decoder(model), [prompt, ROWS[0]], steps=20)  # one row's end is not the other's
    assert [len(found[row]) for row in range(2)] == [positions - 250, 20]
    with pytest.raises(InputError, match=rf"the prompt has {positions} tokens for code, which reads {positions} at mo"):
        decode(Decoder(model), [prompt | {"code": [5] * positions}])


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_generate(model: Any, penalty: float) -> None:
    inputs = batch(rows=(1,))
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None, repetition_penalty=penalty)
    found = decode(Decoder(model), [ROWS[1]], sampling=Sampling(repetition_penalty=penalty))
    assert found[0] == response(sequences, inputs)[0]


def test_repetition_penalty_does_not_see_what_pads_shorter_prompts(model: Any) -> None:
    penalised = Sampling(repetition_penalty=1e-4)  # prefers whatever was there before
    together = decode(Decoder(model), ROWS, sampling=penalised)
    for row, prompt in enumerate(ROWS):
        assert decode(Decoder(model), [prompt], sampling=penalised) == {0: together[row]}


def test_draws_follow_the_seed_and_the_row_not_the_batch(model: Any) -> None:
    drawn = Sampling(temperature=1.0, seed=3)
    together = decode(Decoder(model), ROWS, sampling=drawn)
    alone = {
        row: decode(Decoder(model), [prompt], sampling=drawn, first_row=row)[row] for row, prompt in enumerate(ROWS)
    }
    assert together == alone
    assert together != decode(Decoder(model), ROWS, sampling=Sampling(temperature=1.0, seed=4))
    same = decode(Decoder(model), [ROWS[0]] * 3, sampling=drawn)
    assert len({tuple(answer) for answer in same.values()}) == 3


@pytest.mark.parametrize("only_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_drawing_among_the_single_best_token_is_greedy(model: Any, only_best: Any) -> None:
    assert decode(Decoder(model), ROWS, sampling=Sampling(temperature=5.0, **only_best)) == decode(Decoder(model), ROWS)


def test_draws_have_the_probabilities_of_the_filtered_softmax(model: Any) -> None:
    """3000 first tokens among the 3 likeliest: each count within 5 standard deviations of its expectation."""
    prompts = [ROWS[0]] * 3000
    tokens = [row[0] for row in decode(Decoder(model), prompts, steps=1, sampling=Sampling(2.0, top_k=3)).values()]
    ids = {name: torch.tensor([prompt]) for name, prompt in ROWS[0].items()}
    with torch.no_grad():
        logits = model(specialist_input_ids=ids, logits_to_keep=1).logits[0, -1]
    best = logits.topk(3)
    for token, p in zip(best.indices.tolist(), (best.values / 2).softmax(-1).tolist(), strict=True):
        assert abs(tokens.count(token) - 3000 * p) < 5 * (3000 * p * (1 - p)) ** 0.5
    assert set(tokens) <= set(best.indices.tolist())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1: expected 0 (greedy) or 0.001 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0: expected above 0 and at most 1"),
        ({"min_p": 1.5}, "--min-p 1.5"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_name_of_their_option(setting: Any, message: Any) -> None:
    with pytest.raises(InputError) as error:
        Sampling(**setting)
    assert str(error.value).startswith(message)
