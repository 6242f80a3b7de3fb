"""transformers' ``generate`` over specialists whose prompts differ in length, against a loop without cache or batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.release_prompts import PROMPTS, STEPS, batch, of_row, response
from transformers import StoppingCriteria


def test_a_batch_of_different_prompts_gives_the_text_of_a_loop_without_cache(model: Any, reference: Any) -> None:
    inputs = batch()
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None)
    assert sequences[:, :-STEPS].equal(inputs["specialist_input_ids"]["text"])
    assert response(sequences, inputs) == [reference.greedy(of_row(row), STEPS) for row in range(3)]


def test_one_prompt_for_all_specialists_generates_the_same_text_batched_and_alone(model: Any, reference: Any) -> None:
    prompts = PROMPTS["math"]
    ids = torch.tensor([[0] * (15 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (15 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": STEPS, "eos_token_id": None}
    sequences = model.generate(ids, attention_mask=mask, **options)
    expected = [reference.greedy(dict.fromkeys(model.names, prompt), STEPS) for prompt in prompts]
    assert sequences[:, 15:].tolist() == expected
    assert model.generate(input_ids=ids[1:2, 9:], **options)[0, 6:].tolist() == expected[1]


def test_eos_ends_a_response_and_the_rest_of_its_row_is_padding(model: Any, reference: Any) -> None:
    inputs = batch()
    free = [reference.greedy(of_row(row), STEPS) for row in range(3)]
    eos = free[0][4]  # a token that comes up: the first response ends there at the latest
    expected = [reference.greedy(of_row(row), STEPS, eos=eos) for row in range(3)]
    found = response(model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=eos, pad_token_id=0), inputs)
    longest = max(map(len, expected))
    assert found == [row + [0] * (longest - len(row)) for row in expected]


def test_without_a_cache_the_text_is_the_same(model: Any) -> None:
    inputs = batch()
    options = {"max_new_tokens": STEPS, "eos_token_id": None}
    assert model.generate(**inputs, use_cache=False, **options).equal(model.generate(**inputs, **options))


def test_a_returned_cache_goes_on_where_the_text_ended(model: Any) -> None:
    inputs = batch(rows=(0,))
    options = {"eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(**inputs, max_new_tokens=STEPS, **options).sequences
    first = model.generate(**inputs, max_new_tokens=5, **options)
    longer = {
        name: torch.cat([prompt, first.sequences[:, -5:]], dim=1)
        for name, prompt in inputs["specialist_input_ids"].items()
    }
    second = model.generate(
        specialist_input_ids=longer, max_new_tokens=STEPS - 5, past_key_values=first.past_key_values, **options
    )
    assert second.sequences.equal(whole)
    lengths = {name: cache.get_seq_length() for name, cache in second.past_key_values.caches.items()}
    assert lengths == {name: len(PROMPTS[name][0]) + STEPS - 1 for name in PROMPTS}


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}]
)
def test_beam_search_with_reordered_caches_finds_what_it_finds_without_a_cache(model: Any, options: Any) -> None:
    inputs = batch()
    found = model.generate(**inputs, max_new_tokens=8, **options)
    assert found.shape[0] == 3 * options.get("num_return_sequences", 1)
    assert found.equal(model.generate(**inputs, max_new_tokens=8, use_cache=False, **options))


def test_sampling_follows_the_seed_and_draws_each_sequence_on_its_own(model: Any) -> None:
    inputs = batch()

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(**inputs, do_sample=True, temperature=0.8, num_return_sequences=2, max_new_tokens=STEPS)

    one = sample(1)
    assert one.shape[0] == 6 and one.equal(sample(1)) and not one.equal(sample(2))
    assert not one[0].equal(one[1])


def test_sampling_among_the_single_best_token_is_greedy(model: Any) -> None:
    inputs, options = batch(), {"max_new_tokens": STEPS, "eos_token_id": None}
    assert model.generate(**inputs, do_sample=True, top_k=1, **options).equal(model.generate(**inputs, **options))


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_every_token(model: Any) -> None:
    inputs, streamer = batch(rows=(1,)), Recorder()
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None, streamer=streamer)
    assert streamer.parts == [PROMPTS["text"][1], *([token] for token in response(sequences, inputs)[0])]
    assert streamer.ended


def test_stopping_criteria_see_the_growing_sequence(model: Any) -> None:
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= len(PROMPTS["text"][1]) + 3)

    inputs = batch(rows=(1,))
    sequences = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None, stopping_criteria=[AfterThree()])
    assert len(response(sequences, inputs)[0]) == 3


def test_scores_that_generate_returns_are_the_reference_logits(model: Any, reference: Any, close: Any) -> None:
    inputs = batch(rows=(0,))
    output = model.generate(
        **inputs, max_new_tokens=4, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    tokens = response(output.sequences, inputs)[0]
    for step, logits in enumerate(output.logits):
        expected, _ = reference({name: prompt + tokens[:step] for name, prompt in of_row(0).items()}, 1)
        torch.testing.assert_close(logits[0].double(), expected[0], **close)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_implementation": "static"}, "cache_implementation: 'static' is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "only supports"),
        ({"return_gate_weights": True}, "call forward"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size: not supported"),
        ({"input_ids": torch.ones(3, 2, dtype=torch.long)}, "not both"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_what_generation_cannot_do_is_refused(model: Any, options: Any, words: Any) -> None:
    with pytest.raises(ValueError, match=words):
        model.generate(**batch(), max_new_tokens=2, **options)


def test_padding_on_the_right_is_refused(model: Any) -> None:
    inputs = batch()
    inputs["specialist_attention_mask"]["code"] = inputs["specialist_attention_mask"]["code"].flip(1)
    with pytest.raises(ValueError, match="code is padded on the right"):
        model.generate(**inputs, max_new_tokens=2)


def test_a_cache_that_already_holds_the_whole_prompt_is_refused(model: Any) -> None:
    inputs = batch(rows=(0,))
    cache = model(specialist_input_ids=inputs["specialist_input_ids"]).past_key_values
    with pytest.raises(ValueError, match="give a longer prompt"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
