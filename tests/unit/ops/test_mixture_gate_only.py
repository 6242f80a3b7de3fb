"""The one-pass backend of stage 1: hidden states and heads are frozen, only the gate receives a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import IGNORE, answer_of, make_case, relative_error, rule_violations, truth

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import gate_only, gemm, mixture_cross_entropy, mixture_cross_entropy_with_rows
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue
from ultrafuser_mega.ops.problem import checked_problem

GATE = (True, False, False)
REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("widths", "vocab", "rows"),
    [
        ((8,), 333, 37),
        ((16, 7), 7, 37),
        ((8, 12, 5), 1, 5),
        ((4, 6, 8, 3, 5), 2500, 9),
        ((8, 6), 50, 0),
        ((8, 6), 50, 1),
    ],
)
def test_float64_agrees_with_the_closed_form_to_rounding(widths: Any, vocab: Any, rows: Any, reduction: Any) -> None:
    case = make_case(
        51,
        rows=rows,
        vocab=vocab,
        widths=widths,
        dtype=torch.float64,
        padding=3,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=0.01,
    )
    answer, expected = answer_of(mixture_cross_entropy, case, GATE, backend="gate_only"), truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    # with one specialist the gradient is 0 and what is left of it is rounding
    assert float((answer.gate - expected.gate).norm()) <= 1e-12 * (1 + float(expected.gate.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "values", [{}, {"gate_scale": 200.0}, {"ignored": 2.0}], ids=["ordinary", "saturated", "ignored"]
)
def test_error_stays_within_the_rule_of_plain_pytorch(values: Any, reduction: str, dtype: Any) -> None:
    case = make_case(
        52, rows=64, vocab=333, widths=(16, 24, 8), dtype=dtype, reduction=reduction, label_smoothing=0.1, **values
    )
    answer = answer_of(mixture_cross_entropy, case, GATE, backend="gate_only")
    assert rule_violations(answer, case, gate_alone=True) == []


@pytest.mark.parametrize("values", [{"logit_scale": 1e4}, {"common_offset": 1e4}, {"common_offset": 1e6}], ids=str)
def test_extreme_logits_stay_within_the_rule_of_plain_pytorch(values: Any) -> None:
    case = make_case(53, rows=64, vocab=333, widths=(16, 24, 8), label_smoothing=0.1, z_loss=1e-4, **values)
    answer = answer_of(mixture_cross_entropy, case, GATE, backend="gate_only")
    assert rule_violations(answer, case, gate_alone=True) == []


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: Any) -> None:
    case = make_case(54, rows=5, vocab=7, widths=(3, 2), dtype=torch.float64, reduction=reduction, z_loss=0.1)

    def loss(gate: Any) -> Any:
        return mixture_cross_entropy(case.hidden, case.heads, gate, case.target, **case.options, backend="gate_only")

    assert torch.autograd.gradcheck(loss, [case.gate_logits.requires_grad_()])


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
def test_any_chunk_size_and_the_plain_pytorch_epilogue_give_the_same_answer(rows_per_chunk: int) -> None:
    case = make_case(55, rows=37, vocab=50, widths=(4, 3), dtype=torch.float64, label_smoothing=0.1)
    problem = checked_problem(
        case.hidden,
        case.heads,
        case.gate_logits.requires_grad_(),
        case.target,
        group=None,
        vocab_start=0,
        ignore_index=IGNORE,
        reduction="mean",
        z_loss=0.0,
        **case.options,
    )
    for epilogue in (None, TorchEpilogue(torch.float64)):
        loss, _ = gate_only.mixture_loss(problem, buffer_bytes=rows_per_chunk * 2 * 50 * 8, epilogue=epilogue)
        (gradient,) = torch.autograd.grad(1.25 * loss, problem.gate_logits)
        assert relative_error(loss, truth(case).loss) <= 1e-12
        assert relative_error(gradient, truth(case).gate) <= 1e-12


def test_what_an_ignored_row_holds_does_not_matter() -> None:
    case = make_case(56, rows=20, vocab=50, widths=(4, 3))
    clean = answer_of(mixture_cross_entropy, case, GATE)
    ignored = case.target == IGNORE
    for states in case.hidden:
        states[ignored] = torch.nan
    dirty = answer_of(mixture_cross_entropy, case, GATE)
    assert torch.equal(dirty.loss, clean.loss) and torch.equal(dirty.gate, clean.gate)


def test_row_losses_come_with_the_scalar() -> None:
    case = make_case(57, rows=20, vocab=50, widths=(4, 3), dtype=torch.float64, reduction="sum")
    gate = case.gate_logits.requires_grad_()
    _, rows = mixture_cross_entropy_with_rows(case.hidden, case.heads, gate, case.target, **case.options)
    assert not rows.requires_grad
    assert relative_error(rows, truth(case.with_options(reduction="none")).loss) <= 1e-12


def test_repeating_a_call_repeats_every_bit() -> None:
    case = make_case(58, rows=300, vocab=1500, widths=(16, 8))
    first, second = (answer_of(mixture_cross_entropy, case, GATE) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.gate, second.gate)


def test_auto_multiplies_each_head_once_and_never_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes stage 1 cheap: n matrix products in the forward, none in the backward."""
    case = make_case(59, rows=20, vocab=50, widths=(4, 3, 5))
    products: list[int] = []
    accumulate = gemm.accumulate

    def counted(*arguments: Any, **options: Any) -> None:
        products.append(1)
        accumulate(*arguments, **options)

    monkeypatch.setattr(gemm, "accumulate", counted)
    answer_of(mixture_cross_entropy, case, GATE)
    assert len(products) == 3
    products.clear()
    answer_of(mixture_cross_entropy, case)
    assert len(products) == 9


def test_a_trainable_head_is_refused_by_name() -> None:
    case = make_case(60, rows=4, vocab=5, widths=(4, 3))
    case.heads[1].requires_grad_()
    with pytest.raises(InputError, match=r"backend: gate_only gives no gradient for head_weight\[1\]"):
        mixture_cross_entropy(case.hidden, case.heads, case.gate_logits, case.target, backend="gate_only")
