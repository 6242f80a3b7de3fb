"""dz of all rows in the memory of the gradients it becomes: nothing is lost on the way, and chunks do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import Case, answer_of, gradient_of, make_case, relative_error, rule_violations, truth

from ultrafuser_mega.ops import chunked, parked_dlogits
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue
from ultrafuser_mega.ops.problem import checked_problem


@pytest.mark.parametrize("block_columns", [1, 128, 4096])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 20])
def test_every_number_comes_back_whatever_the_chunks_and_blocks(
    rows: int, block_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of whole numbers are exact. 20 rows fill widths 5, 7 and 8 to the last place."""
    monkeypatch.setattr(parked_dlogits, "WORKSPACE_BYTES", rows * block_columns * 4)
    draw = torch.Generator().manual_seed(0)
    columns, widths = 300, (5, 7, 8)
    dz = torch.randint(-9, 9, (rows, columns), generator=draw).float()
    inputs = [torch.randint(-9, 9, (rows, d), generator=draw).float() for d in widths]
    gradients = [torch.full((columns, d), torch.nan) for d in widths]
    parked = parked_dlogits.ParkedDlogits(gradients, rows)
    assert parked.block_columns == min(block_columns, columns)
    for start in range(0, rows, 3):
        parked.park(slice(start, min(start + 3, rows)), dz[start : start + 3])
    parked.finish(inputs)
    for gradient, x in zip(gradients, inputs, strict=True):
        assert torch.equal(gradient, dz.t() @ x)


class SixteenBits(TorchEpilogue):
    """As on a GPU: fp32 logits, dz rounded to bf16."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)

    def dlogits(self, logits: Any, scratch: Any, target: Any, row_max: Any, coefficients: Any) -> Any:
        return super().dlogits(logits, scratch, target, row_max, coefficients).bfloat16()


def with_chunks(case: Case, rows_per_chunk: int) -> Any:
    defaults: dict[str, Any] = {"group": None, "vocab_start": 0, "ignore_index": -100, "reduction": "mean"}
    defaults |= {"label_smoothing": 0.0, "z_loss": 0.0}
    row_bytes = case.options["vocab_size"] * 4 + sum(states.shape[1] for states in case.hidden) * 6

    def loss(hidden: Any, heads: Any, gate_logits: Any, target: Any, **options: Any) -> Any:
        problem = checked_problem(hidden, heads, gate_logits, target, **(defaults | options))
        return chunked.mixture_loss(problem, buffer_bytes=rows_per_chunk * row_bytes, epilogue=SixteenBits())[0]

    return answer_of(loss, case)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [30, 31], ids=["as many rows as hidden units", "one more: fp32 sums"])
def test_bf16_head_gradients_of_many_chunks_are_as_exact_as_of_one(rows: int, reduction: str) -> None:
    case = make_case(
        121, rows=rows, vocab=333, widths=(16, 14), dtype=torch.bfloat16, padding=3, reduction=reduction, z_loss=1e-3
    )
    one, many = with_chunks(case, rows), with_chunks(case, 4)
    assert rule_violations(many, case) == []
    rounding = torch.finfo(torch.bfloat16).eps / 2
    for j, (whole, pieces, true) in enumerate(zip(one.heads, many.heads, truth(case).heads, strict=True)):
        assert relative_error(pieces, true) <= 3 * rounding, j  # dz, the product, and the upstream gradient's factor
        assert relative_error(pieces, whole) <= 2 * rounding, j
        assert torch.count_nonzero(pieces[333:]) == 0


def test_a_frozen_head_and_one_with_a_buffer_lend_no_memory() -> None:
    """Room is 6 + 7 units: enough for 13 rows. The other heads come out as ever."""
    case = make_case(122, rows=13, vocab=50, widths=(6, 20, 7, 20), dtype=torch.bfloat16, ignored=0.0, reduction="sum")
    heads = [head.requires_grad_(j != 1) for j, head in enumerate(case.heads)]
    buffer = torch.zeros(50, 20)
    problem = checked_problem(
        case.hidden, heads, case.gate_logits, case.target, group=None, vocab_start=0, vocab_size=50, ignore_index=-100,
        reduction="sum", label_smoothing=0.0, z_loss=0.0,
    )  # fmt: skip
    main_grad = [None, None, None, buffer]
    loss, _ = chunked.mixture_loss(
        problem, head_main_grad=main_grad, buffer_bytes=4 * (50 * 4 + 53 * 6), epilogue=SixteenBits()
    )
    loss.backward(torch.tensor(1.25))
    found = [gradient_of(heads[0]), gradient_of(heads[2]), buffer]
    expected = truth(case).heads
    assert heads[1].grad is None and heads[3].grad is None
    for gradient, true in zip(found, [expected[0], expected[2], expected[3]], strict=True):
        assert relative_error(gradient, true) <= 3 * torch.finfo(torch.bfloat16).eps / 2
