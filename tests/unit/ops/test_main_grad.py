"""Head gradients added to a caller's fp32 buffers (Megatron's weight.main_grad) instead of .grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import Case, answer_of, gradient_of, make_case, relative_error, truth, upstream_of

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import chunked, mixture_cross_entropy
from ultrafuser_mega.ops.problem import checked_problem

REDUCTIONS = ["mean", "sum", "none"]


def with_buffers(case: Case, start: float = 0.0, calls: int = 1, buffer_bytes: int | None = None) -> Any:
    """(gradients of gate and hidden, .grad of the heads, buffers that began at ``start``) after ``calls`` calls."""
    gate = case.gate_logits.clone().requires_grad_()
    hidden = [states.clone().requires_grad_() for states in case.hidden]
    heads = [head.clone().requires_grad_() for head in case.heads]
    buffers = [torch.full(head.shape, start, dtype=case.gate_logits.dtype) for head in heads]
    options = {"group": None, "vocab_start": 0, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
    for _ in range(calls):
        problem = checked_problem(hidden, heads, gate, case.target, **(options | {"reduction": "mean"} | case.options))
        loss, _ = chunked.mixture_loss(problem, head_main_grad=buffers, buffer_bytes=buffer_bytes)
        loss.backward(upstream_of(case).to(loss.dtype))
    return [gate.grad, *(states.grad for states in hidden)], [head.grad for head in heads], buffers


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows_per_buffer", [None, 5], ids=["one chunk", "many chunks"])
def test_buffers_gain_what_grad_would_have_been_and_the_rest_is_as_ever(
    rows_per_buffer: int | None, reduction: Any
) -> None:
    case = make_case(
        101, rows=37, vocab=50, widths=(4, 3), dtype=torch.float64, padding=2, reduction=reduction, label_smoothing=0.1
    )
    buffer_bytes = rows_per_buffer and rows_per_buffer * 64 * 8
    others, grads, buffers = with_buffers(case, start=3.0, buffer_bytes=buffer_bytes)
    expected = truth(case)
    assert grads == [None, None]
    for buffer, true in zip(buffers, expected.heads, strict=True):
        assert relative_error(buffer - 3.0, true) <= 1e-12
        assert torch.equal(buffer[50:], torch.full_like(buffer[50:], 3.0))  # padding
    for gradient, true in zip(others, [expected.gate, *expected.hidden], strict=True):
        assert relative_error(gradient, true) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sixteen_bit_heads_collect_over_calls_without_rounding_to_sixteen_bits(reduction: Any, dtype: Any) -> None:
    """Eight calls: .grad would round eight times to the heads' type; the buffer holds what the products gave."""
    case = make_case(102, rows=64, vocab=50, widths=(8, 6), dtype=dtype, reduction=reduction)
    _, _, buffers = with_buffers(case, calls=8)
    _, _, once = with_buffers(case)
    ordinary = answer_of(mixture_cross_entropy, case, backend="chunked")
    for buffer, single, gradient, true in zip(buffers, once, ordinary.heads, truth(case).heads, strict=True):
        assert relative_error(buffer / 8, single) <= 8 * torch.finfo(torch.float32).eps
        assert relative_error(single, true) <= relative_error(gradient, true) + 1e-6
        assert relative_error(gradient, single) <= torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeating_a_call_repeats_every_bit(reduction: Any) -> None:
    case = make_case(103, rows=300, vocab=200, widths=(16, 8), reduction=reduction)
    first, second = (with_buffers(case, start=1.0, buffer_bytes=100_000)[2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_head_without_a_buffer_has_its_grad_and_a_frozen_head_leaves_its_buffer_alone(reduction: Any) -> None:
    case = make_case(104, rows=20, vocab=30, widths=(4, 3, 5), dtype=torch.float64, reduction=reduction)
    heads = [case.heads[0].requires_grad_(), case.heads[1].requires_grad_(), case.heads[2]]
    buffers = [torch.zeros_like(heads[0]), None, torch.zeros_like(heads[2])]
    loss = mixture_cross_entropy(
        case.hidden, heads, case.gate_logits, case.target, **case.options, head_main_grad=buffers
    )
    first, _, frozen = buffers
    assert first is not None and frozen is not None
    assert torch.count_nonzero(first) == 0  # nothing is added before the backward
    loss.backward(upstream_of(case))
    assert heads[0].grad is None
    assert relative_error(first, truth(case).heads[0]) <= 1e-12
    assert relative_error(gradient_of(heads[1]), truth(case).heads[1]) <= 1e-12
    assert torch.count_nonzero(frozen) == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward_on_a_retained_graph_adds_a_second_time(reduction: Any) -> None:
    case = make_case(105, rows=20, vocab=30, widths=(4,), dtype=torch.float64, reduction=reduction)
    buffer = torch.zeros_like(case.heads[0])
    head = case.heads[0].requires_grad_()
    loss = mixture_cross_entropy(
        case.hidden, [head], case.gate_logits, case.target, **case.options, head_main_grad=[buffer]
    )
    loss.backward(upstream_of(case), retain_graph=True)
    loss.backward(upstream_of(case))
    assert relative_error(buffer / 2, truth(case).heads[0]) <= 1e-12


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_kept_row_adds_nothing(reduction: Any, dtype: Any, rows: int) -> None:
    case = make_case(106, rows=rows, vocab=11, widths=(4, 3), dtype=dtype, ignored=2.0, reduction=reduction)
    _, grads, buffers = with_buffers(case, start=2.0)
    assert grads == [None, None]
    assert all(torch.equal(buffer, torch.full_like(buffer, 2.0)) for buffer in buffers)


def call(**change: Any) -> Any:
    case = make_case(107, rows=4, vocab=5, widths=(4, 3))
    heads = [head.requires_grad_() for head in case.heads]
    arguments = {"head_main_grad": [torch.zeros(5, 4), torch.zeros(5, 3)]} | change
    return mixture_cross_entropy(case.hidden, heads, case.gate_logits, case.target, **arguments)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"head_main_grad": [torch.zeros(5, 4)]}, "head_main_grad: 1 buffers, needed 2, one per head"),
    "another shape": (
        {"head_main_grad": [None, torch.zeros(5, 4)]},
        r"head_main_grad\[1\]: shape \(5, 4\), needed \(5, 3\)",
    ),
    "sixteen bits": (
        {"head_main_grad": [torch.zeros(5, 4).bfloat16(), None]},
        r"head_main_grad\[0\]: dtype torch.bfloat16, needed torch.float32",
    ),
    "trainable": (
        {"head_main_grad": [torch.zeros(5, 4, requires_grad=True), None]},
        r"head_main_grad\[0\]: requires a gradient",
    ),
    "another backend": (
        {"backend": "reference"},
        "head_main_grad: backend reference cannot add to buffers; use chunked",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_buffers_are_named_in_one_line(what: Any) -> None:
    change, message = BAD[what]
    with pytest.raises(InputError, match=message) as caught:
        call(**change)
    assert "\n" not in str(caught.value)


def test_the_good_call_these_differ_from_is_accepted() -> None:
    call().backward()
