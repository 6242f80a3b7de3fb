"""Every backend against the float64 closed form, over shapes, values and types that break naive ones.

Errors are ||value - truth|| / ||truth||. fp64 must agree to rounding (1e-12). In fp32 and below the yardstick is plain
PyTorch in the same type on the same numbers: see rule_violations.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.mixture_cases import IGNORE, answer_of, make_case, relative_error, rule_violations, truth

from ultrafuser_mega.ops import mixture_cross_entropy, mixture_cross_entropy_with_rows

TRAINABLE_BACKENDS = ["reference", "chunked"]
REDUCTIONS = ["mean", "sum", "none"]

SHAPES = {  # widths, vocab, rows: a covering set, not the product
    "one specialist": ((8,), 333, 37),
    "two ragged": ((16, 7), 7, 37),
    "three": ((8, 12, 5), 333, 37),
    "three, one word": ((8, 12, 5), 1, 5),
    "five": ((4, 6, 8, 3, 5), 101, 37),
    "one row": ((8, 12, 5), 333, 1),
    "several epilogue blocks": ((8, 6), 2500, 9),
}

VALUES: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "logits of 1e4": {"logit_scale": 1e4},
    "common offset of 1e4": {"common_offset": 1e4},
    "common offset of 1e6": {"common_offset": 1e6},
    "gate saturated": {"gate_scale": 200.0},
    "all rows ignored": {"ignored": 2.0},
}


def assert_close_to_truth(answer: Any, expected: Any, tolerance: Any) -> None:
    assert relative_error(answer.loss, expected.loss) <= tolerance
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= tolerance, name


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_with_the_closed_form_to_rounding(shape: Any, reduction: Any, backend: str) -> None:
    widths, vocab, rows = SHAPES[shape]
    case = make_case(
        1,
        rows=rows,
        vocab=vocab,
        widths=widths,
        dtype=torch.float64,
        padding=3,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=0.01,
    )
    assert_close_to_truth(answer_of(mixture_cross_entropy, case, backend=backend), truth(case), 1e-12)


# in fp16 plain PyTorch overflows on the large logits, so there is no yardstick for them
VALUES_AND_TYPES = [(values, dtype) for values in VALUES for dtype in (torch.float32, torch.bfloat16)] + [
    (values, torch.float16) for values in ("ordinary", "gate saturated", "all rows ignored")
]


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
@pytest.mark.parametrize(("values", "dtype"), VALUES_AND_TYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_stays_within_the_rule_of_plain_pytorch(
    reduction: str, values: Any, dtype: torch.dtype, backend: str
) -> None:
    case = make_case(
        2,
        rows=64,
        vocab=333,
        widths=(16, 24, 8),
        dtype=dtype,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=1e-4,
        **VALUES[values],
    )
    assert rule_violations(answer_of(mixture_cross_entropy, case, backend=backend), case) == []


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: Any, backend: str) -> None:
    case = make_case(3, rows=5, vocab=7, widths=(3, 2), dtype=torch.float64)
    inputs = [case.gate_logits, *case.hidden, *case.heads]

    def loss(gate: Any, *tensors: Any) -> Any:
        return mixture_cross_entropy(
            tensors[:2],
            tensors[2:],
            gate,
            case.target,
            reduction=reduction,
            label_smoothing=0.2,
            z_loss=0.1,
            backend=backend,
        )

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 6])
def test_no_kept_row_gives_zero_loss_and_zero_gradients(rows: int, reduction: Any, backend: str) -> None:
    case = make_case(4, rows=rows, vocab=11, widths=(4, 3), ignored=2.0, reduction=reduction, label_smoothing=0.1)
    answer = answer_of(mixture_cross_entropy, case, backend=backend)
    assert answer.loss.shape == ((rows,) if reduction == "none" else ())
    assert torch.count_nonzero(answer.loss) == 0
    for name, gradient in answer.gradients().items():
        assert torch.count_nonzero(gradient) == 0, name


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
def test_what_an_ignored_row_holds_does_not_matter(backend: str) -> None:
    case = make_case(5, rows=20, vocab=50, widths=(4, 3), reduction="sum", z_loss=0.01)
    ignored = case.target == IGNORE
    clean = answer_of(mixture_cross_entropy, case, backend=backend)
    for states in case.hidden:
        states[ignored] = math.nan
    case.gate_logits[ignored] = math.inf
    dirty = answer_of(mixture_cross_entropy, case, backend=backend)
    assert torch.equal(dirty.loss, clean.loss)
    for name, gradient in dirty.gradients().items():
        assert torch.equal(gradient, clean.gradients()[name]), name
    assert torch.count_nonzero(dirty.gate[ignored]) == 0
    assert torch.count_nonzero(dirty.hidden[0][ignored]) == 0


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
def test_a_word_masked_by_minus_infinity_has_no_probability_and_no_gradient(backend: str) -> None:
    case = make_case(6, rows=10, vocab=30, widths=(4, 3), ignored=0.0, reduction="sum")
    for states, head in zip(case.hidden, case.heads, strict=True):
        states[:, 0] = 1.0
        head[7] = 0.0
        head[7, 0] = -1e30
    case.target[case.target == 7] = 8
    answer = answer_of(mixture_cross_entropy, case, backend=backend)
    assert torch.isfinite(answer.loss)
    assert all(torch.count_nonzero(head[7]) == 0 for head in answer.heads)
    assert all(torch.isfinite(gradient).all() for gradient in answer.gradients().values())


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_required_gradients_are_computed_and_they_are_the_same(needs: Any, reduction: Any, backend: str) -> None:
    case = make_case(7, rows=20, vocab=40, widths=(4, 3), dtype=torch.float64, reduction=reduction)
    answer = answer_of(mixture_cross_entropy, case, needs, backend=backend)
    expected = truth(case).gradients()
    for name in expected:
        wanted = needs[("gate", "hidden", "heads").index(name.split("[")[0])]
        assert (name in answer.gradients()) == wanted, name
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected[name]) <= 1e-12, name


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_frozen_specialist_among_trainable_ones(reduction: Any) -> None:
    case = make_case(8, rows=20, vocab=40, widths=(4, 3), dtype=torch.float64, reduction=reduction)
    hidden = [case.hidden[0].requires_grad_(), case.hidden[1]]
    heads = [case.heads[0], case.heads[1].requires_grad_()]
    loss = mixture_cross_entropy(hidden, heads, case.gate_logits, case.target, **case.options, backend="chunked")
    up = torch.linspace(0.5, 1.5, 20, dtype=torch.float64) if reduction == "none" else torch.tensor(1.25).double()
    d_hidden, d_head = torch.autograd.grad(loss, [hidden[0], heads[1]], up)
    expected = truth(case)
    assert relative_error(d_hidden, expected.hidden[0]) <= 1e-12
    assert relative_error(d_head, expected.heads[1]) <= 1e-12


@pytest.mark.parametrize("backend", TRAINABLE_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_losses_come_with_the_scalar_and_carry_no_gradient(reduction: Any, backend: str) -> None:
    case = make_case(9, rows=20, vocab=40, widths=(4, 3), dtype=torch.float64, reduction=reduction, label_smoothing=0.1)
    hidden = [states.requires_grad_() for states in case.hidden]
    loss, rows = mixture_cross_entropy_with_rows(
        hidden, case.heads, case.gate_logits, case.target, **case.options, backend=backend
    )
    assert loss.requires_grad and not rows.requires_grad
    assert relative_error(rows, truth(case.with_options(reduction="none")).loss) <= 1e-12
    assert torch.count_nonzero(rows[case.target == IGNORE]) == 0


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeating_a_call_repeats_every_bit(reduction: Any, needs: Any) -> None:
    case = make_case(10, rows=300, vocab=1500, widths=(16, 8), reduction=reduction)
    first = answer_of(mixture_cross_entropy, case, needs, backend="chunked")
    second = answer_of(mixture_cross_entropy, case, needs, backend="chunked")
    assert torch.equal(first.loss, second.loss)
    for name, gradient in first.gradients().items():
        assert torch.equal(gradient, second.gradients()[name]), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_backward_may_run_twice_on_a_retained_graph(reduction: Any, factor: float) -> None:
    case = make_case(11, rows=20, vocab=40, widths=(4, 3), dtype=torch.float64, reduction=reduction)
    inputs = [tensor.requires_grad_() for tensor in (case.gate_logits, *case.hidden, *case.heads)]
    loss = mixture_cross_entropy(inputs[1:3], inputs[3:], inputs[0], case.target, **case.options, backend="chunked")
    up = torch.full_like(loss, factor)
    first = torch.autograd.grad(loss, inputs, up, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(0.5)  # the caller's own: nothing that the graph has kept
    second = torch.autograd.grad(loss, inputs, up)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert all(torch.equal(0.5 * a, b) for a, b in zip(kept, first, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs, up)


def test_transposed_and_sliced_inputs_need_no_copy_by_the_caller() -> None:
    case = make_case(12, rows=20, vocab=40, widths=(4, 3), dtype=torch.float64, reduction="sum")
    hidden = [states.t().contiguous().t() for states in case.hidden]
    heads = [torch.cat((head, head), 1)[:, : head.shape[1]] for head in case.heads]
    target = torch.stack((case.target, case.target), 1)[:, 0]
    loss = mixture_cross_entropy(hidden, heads, case.gate_logits, target, **case.options, backend="chunked")
    assert relative_error(1.25 * loss, 1.25 * truth(case).loss) <= 1e-12


def test_autocast_does_not_change_the_answer() -> None:
    case = make_case(13, rows=20, vocab=40, widths=(4, 3), reduction="sum")
    plain = answer_of(mixture_cross_entropy, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = answer_of(mixture_cross_entropy, case)
    assert torch.equal(plain.loss, inside.loss) and torch.equal(plain.heads[0], inside.heads[0])


def test_fp16_gradients_survive_a_loss_scale_that_fp16_itself_cannot_hold() -> None:
    """With a loss scale of 2^16 and thousands of words, dz = scale * p is too large and p too small for fp16."""
    case = make_case(14, rows=16, vocab=2000, widths=(8, 6), dtype=torch.float16, reduction="none", ignored=0.0)
    hidden = [states.requires_grad_() for states in case.hidden]
    heads = [head.requires_grad_() for head in case.heads]
    loss = mixture_cross_entropy(hidden, heads, case.gate_logits, case.target, **case.options)
    d_head = torch.autograd.grad(loss, heads[0], torch.full((16,), 2.0**12))[0]
    expected = truth(case.with_options(reduction="sum")).heads[0] / 1.25 * 2.0**12
    assert relative_error(d_head, expected) <= 2**-10  # fp16 rounds to 2^-11
