"""The released model's logits, gate weights and loss, against a float64 reference (tests/support/release_folder.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.release_folder import PIECES

from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, PIECES, shape, generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def test_ids_alone_go_to_all_specialists_and_every_position_has_fused_logits(
    model: Any, reference: Any, close: Any
) -> None:
    ids = random_ids(3, 17)
    output = model(ids, return_gate_weights=True)
    assert output.logits.shape == (3, 17, PIECES) and output.logits.dtype == torch.float32
    for row, logits, weights in zip(ids, output.logits, output.gate_weights, strict=True):
        expected, expected_weights = reference(dict.fromkeys(model.names, row.tolist()), 17)
        torch.testing.assert_close(logits.double(), expected, **close)
        torch.testing.assert_close(weights.double(), expected_weights, **close)
    torch.testing.assert_close(output.gate_weights.sum(-1), torch.ones(3, 17))
    assert output.gate_weights.std(dim=(0, 1)).min() > 0.01, "the test's gate must tell positions apart"


def test_specialists_of_one_width_share_a_gate_layer_and_keep_their_order(models: Any) -> None:
    assert [name for name, _ in models["qwens"].gate.named_parameters()] == ["b1", "w2", "w1.shared"]
    assert [name for name, _ in models["llamas"].gate.w1.named_parameters()] == ["text", "code", "math"]
    assert models["llamas"].names == models["qwens"].names == ["text", "code", "math"]


@torch.no_grad()
def test_prompts_of_different_lengths_are_aligned_at_their_ends(model: Any, reference: Any, close: Any) -> None:
    response = [random_ids(6, seed=row).tolist() for row in range(2)]
    prompts = {
        name: [random_ids(length, seed=10 + row).tolist() for row, length in enumerate(lengths)]
        for name, lengths in zip(model.names, [(3, 9), (12, 5), (1, 20)], strict=True)
    }
    whole = {name: [prompts[name][row] + response[row] for row in range(2)] for name in model.names}
    ids, masks = {}, {}
    for name in model.names:
        ids[name], masks[name] = pad_left(whole[name])
    output = model(
        specialist_input_ids=ids, specialist_attention_mask=masks, logits_to_keep=7, return_gate_weights=True
    )
    for row in range(2):
        expected, weights = reference({name: whole[name][row] for name in model.names}, 7)
        torch.testing.assert_close(output.logits[row].double(), expected, **close)
        torch.testing.assert_close(output.gate_weights[row].double(), weights, **close)


@torch.no_grad()
def test_without_logits_to_keep_specialist_prompts_give_as_many_positions_as_the_shortest_has(model: Any) -> None:
    lengths = dict(zip(model.names, (9, 4, 12), strict=True))
    ids = {name: random_ids(2, length) for name, length in lengths.items()}
    assert model(specialist_input_ids=ids).logits.shape == (2, 4, PIECES)


@torch.no_grad()
def test_left_padding_changes_nothing_but_the_padding(model: Any, close: Any) -> None:
    rows = [random_ids(5).tolist(), random_ids(11, seed=1).tolist()]
    ids, mask = pad_left(rows)
    batched = model(ids, attention_mask=mask).logits
    for row, logits in zip(rows, batched, strict=True):
        torch.testing.assert_close(logits[-len(row) :], model(torch.tensor([row])).logits[0], **close)


@torch.no_grad()
def test_a_cache_gives_the_same_logits_as_the_whole_sequence(model: Any, close: Any) -> None:
    ids = random_ids(2, 14)
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    first = model(ids[:, :9])
    second = model(ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits, **close)


@torch.no_grad()
def test_logits_to_keep_takes_the_last_positions(model: Any, close: Any) -> None:
    ids = random_ids(2, 8)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], **close)


def test_the_loss_is_that_of_the_next_token_and_reaches_the_gate_and_every_head_row(
    release: Any, reference: Any, close: Any
) -> None:
    model: Any = UltraFuserForCausalLM.from_pretrained(release)
    ids = random_ids(1, 12)
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(ids, labels=labels)
    logits, _ = reference(dict.fromkeys(model.names, ids[0].tolist()), 12)
    expected = torch.nn.functional.cross_entropy(logits[4:-1], ids[0, 5:])
    torch.testing.assert_close(output.loss.double(), expected, **close)
    summed = model(ids, labels=labels, num_items_in_batch=2).loss
    torch.testing.assert_close(summed.double(), expected * 7 / 2, atol=1e-4, rtol=0.0)

    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.gate.parameters())
    for name in model.names:
        head = model.specialists[name].lm_head.weight
        assert head.grad[:PIECES].abs().sum(dim=1).min() > 0
        assert not head.grad[PIECES:].any(), "rows beyond the shared vocabulary take no part"


def test_a_tied_specialist_comes_with_a_head_of_its_own(models: Any) -> None:
    tied_once = models["qwens"].specialists["text"]
    assert not torch.equal(tied_once.lm_head.weight, tied_once.model.embed_tokens.weight)
    assert not models["qwens"].all_tied_weights_keys


def test_saving_and_loading_again_keeps_every_tensor_and_the_configuration(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = UltraFuserForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    assert set(again.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.config.specialists == model.config.specialists


def test_dtype_and_attention_that_are_asked_for_reach_every_specialist(release: Any) -> None:
    model: Any = UltraFuserForCausalLM.from_pretrained(release, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {model.specialists[name].config._attn_implementation for name in model.names} == {"eager"}
    assert model(random_ids(1, 4)).logits.dtype == torch.float32


def test_a_model_made_from_the_configuration_alone_has_a_gate_like_a_linear_layer(model: Any) -> None:
    fresh = UltraFuserForCausalLM(model.config)
    for name, w1 in fresh.gate.w1.named_parameters():
        width = w1.shape[1]
        assert name == "shared" or width == model.config.specialist_config(name).hidden_size
        bound = width**-0.5
        assert -bound <= w1.min() < -0.9 * bound and 0.9 * bound < w1.max() <= bound


def test_a_tuple_comes_back_where_one_is_asked_for(model: Any) -> None:
    (logits,) = model(random_ids(1, 4), use_cache=False, return_dict=False)
    assert logits.shape == (1, 4, PIECES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "input_ids: missing"),
        ({"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 4)}, "inputs_embeds: not supported"),
        ({"input_ids": random_ids(1, 3), "output_attentions": True}, "output_attentions: not supported"),
        ({"input_ids": random_ids(1, 3), "past_key_values": object()}, "the cache that it returned itself"),
        ({"input_ids": random_ids(1, 3), "labels": random_ids(1, 2)}, "one label per position"),
        ({"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 2)}, "expected (1, 0 cached + 3 given)"),
        ({"input_ids": random_ids(1, 3), "logits_to_keep": 4}, "logits_to_keep: 4 is more than the 3 tokens"),
        ({"specialist_input_ids": {"text": random_ids(1, 3)}}, "expected exactly text, code, math"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_in_one_line(model: Any, arguments: Any, words: Any) -> None:
    with pytest.raises(ValueError) as caught:
        model(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_shared_and_separate_prompts_at_once_are_refused(model: Any) -> None:
    ids = random_ids(1, 3)
    with pytest.raises(ValueError, match="not both"):
        model(ids, specialist_input_ids=dict.fromkeys(model.names, ids))
    uneven = dict.fromkeys(model.names, ids) | {"math": random_ids(2, 3)}
    with pytest.raises(ValueError, match="batch sizes differ"):
        model(specialist_input_ids=uneven)
