"""How the chunked backend is cut must not show: chunk sizes, buffers, types of accumulators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import Case, answer_of, make_case, relative_error, rule_violations, truth

from ultrafuser_mega.ops import chunked, forward, gemm
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue
from ultrafuser_mega.ops.problem import checked_problem

DEFAULTS: dict[str, Any] = {
    "group": None,
    "vocab_start": 0,
    "vocab_size": None,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
}


def chunked_loss(
    hidden: Any,
    heads: Any,
    gate_logits: Any,
    target: Any,
    *,
    buffer_bytes: Any = None,
    epilogue: Any = None,
    **options: Any,
) -> Any:
    problem = checked_problem(hidden, heads, gate_logits, target, **(DEFAULTS | options))
    return chunked.mixture_loss(problem, buffer_bytes=buffer_bytes, epilogue=epilogue)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 36, 37, 1000])
def test_any_chunk_size_gives_the_same_answer(rows_per_chunk: int, reduction: str) -> None:
    case = make_case(
        21, rows=37, vocab=50, widths=(4, 3), dtype=torch.float64, padding=2, reduction=reduction, label_smoothing=0.1
    )
    answer = answer_of(chunked_loss, case, buffer_bytes=rows_per_chunk * 50 * 8)
    expected = truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-12, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("columns", [1, 16, 49, 50])
@pytest.mark.parametrize("rows_per_chunk", [7, 1000])
def test_any_blocks_of_the_vocabulary_give_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, columns: int, reduction: str
) -> None:
    monkeypatch.setitem(forward.BLOCK_COLUMNS, "cpu", columns)
    case = make_case(
        23, rows=37, vocab=50, widths=(4, 3), dtype=torch.float64, padding=2, reduction=reduction, label_smoothing=0.1
    )
    answer = answer_of(chunked_loss, case, buffer_bytes=rows_per_chunk * 50 * 8)
    expected = truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_head_gradients_do_not_grow_worse_with_the_number_of_chunks(dtype: Any) -> None:
    """64 chunks of one row each, summed in fp32 and rounded once: the error is one rounding, not sixty-four."""
    case = make_case(22, rows=64, vocab=50, widths=(8, 6), dtype=dtype, reduction="sum")
    answer = answer_of(chunked_loss, case, buffer_bytes=50 * 4)
    rounding = torch.finfo(dtype).eps / 2
    for j, gradient in enumerate(answer.heads):
        assert relative_error(gradient, truth(case).heads[j]) <= 2 * rounding


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_may_round_otherwise_in_a_product_of_another_shape(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some BLAS do. With "none" the forward's products are blocks of the vocabulary, the backward's are not."""
    product = gemm.accumulate

    def by_shape(out: Any, a: Any, b: Any, **options: Any) -> None:
        if out.shape[1] < 2500:  # from the last k to the first
            a, b = a.flip(1), b.flip(0)
        product(out, a, b, **options)

    case = make_case(26, rows=20, vocab=2500, widths=(16, 24, 8), reduction=reduction, common_offset=1e6)
    monkeypatch.setattr(gemm, "accumulate", by_shape)
    assert rule_violations(answer_of(chunked_loss, case), case) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_pytorch_epilogue_is_a_twin_of_the_compiled_one(dtype: Any) -> None:
    case = make_case(23, rows=37, vocab=1500, widths=(8, 6), dtype=dtype, label_smoothing=0.1, z_loss=0.01)
    twin = answer_of(chunked_loss, case, epilogue=TorchEpilogue(dtype))
    compiled = answer_of(chunked_loss, case)
    tolerance = 20 * torch.finfo(dtype).eps
    assert relative_error(compiled.loss, twin.loss) <= tolerance
    for name, gradient in compiled.gradients().items():
        assert relative_error(gradient, twin.gradients()[name]) <= tolerance, name


class HalfDlogits(TorchEpilogue):
    """As on a GPU: fp32 logits, dz rounded to fp16."""

    def __init__(self) -> None:
        super().__init__(torch.float16)

    def dlogits(self, logits: Any, scratch: Any, target: Any, row_max: Any, coefficients: Any) -> Any:
        return super().dlogits(logits, scratch, target, row_max, coefficients).half()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_words_too_improbable_for_fp16_keep_their_part_of_an_fp16_head_gradient(reduction: str) -> None:
    """One word takes all probability but about 2^-26 for each other one, less than half of the smallest fp16 number.

    A loss scale of 2^16 makes their gradients large enough for fp16 again, if they survived until it is applied.
    """
    case = make_case(25, rows=8, vocab=64, widths=(4, 3), dtype=torch.float16, ignored=0.0, logit_scale=0.1)
    for states, head in zip(case.hidden, case.heads, strict=True):
        states.abs_()  # no cancellation among rows: errors of dz are errors of the gradient
        states[:, 0] = 1.0
        head[0] = 0.0
        head[0, 0] = 18.0
    case.target[:] = 0
    heads = [head.requires_grad_() for head in case.heads]
    loss = chunked_loss(case.hidden, heads, case.gate_logits, case.target, reduction=reduction, epilogue=HalfDlogits())
    found = torch.autograd.grad(loss, heads, torch.full_like(loss, 2.0**16))
    expected = truth(Case(case.hidden, [head.detach() for head in heads], case.gate_logits, case.target, case.options))
    share = 2.0**16 / 1.25 * (1 if reduction == "mean" else 8)  # truth: upstream 1.25, mean of 8 rows
    weights = torch.softmax(case.gate_logits.double(), 1)
    parts = [
        weights[:, j, None] * (h.double() @ w.detach().double().t())
        for j, (h, w) in enumerate(zip(case.hidden, heads, strict=True))
    ]
    z = torch.stack(parts).sum(0)
    rarest = float(torch.softmax(z, 1).min())
    assert float(torch.softmax(z, 1)[:, 1:].max()) < 2**-25
    half_a_step = 2**-25 / 256  # of what dz is stored in, scaled by 256
    for gradient, true in zip(found, expected.heads, strict=True):
        assert relative_error(gradient[1:], true[1:] * share) <= half_a_step / rarest + 3 * 2**-11


@pytest.mark.parametrize("vocab", [1000, 3], ids=["logits weigh most", "hidden states weigh most"])
def test_what_grows_with_a_chunk_stays_within_its_budget(vocab: int) -> None:
    case = make_case(24, rows=4096, vocab=vocab, widths=(40, 30))
    problem = checked_problem(case.hidden, case.heads, case.gate_logits, case.target, **DEFAULTS)
    plan = chunked.Plan(problem, buffer_bytes=1 << 20)
    logits, inputs, d_inputs = vocab * 4, 70 * 4, 70 * 4  # bytes per row
    assert plan.chunk_rows * (plan.buffers * (logits + inputs) + d_inputs) <= 1 << 20
    assert plan.chunk_rows * (logits + inputs + d_inputs) > 1 << 19  # and makes use of it
    assert [(c.start, c.stop) for c in plan.chunks(5)] == [(0, 5)]
    covered = [row for c in plan.chunks(4096) for row in range(c.start, c.stop)]
    assert covered == list(range(4096))
