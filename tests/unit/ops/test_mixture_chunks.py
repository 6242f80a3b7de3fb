"""How the chunked backend is cut must not show: chunk sizes, buffers, types of accumulators."""

from __future__ import annotations

import pytest
import torch

from ultrafuser_mega.ops import chunked
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue
from ultrafuser_mega.ops.problem import checked_problem
from ultrafuser_mega.ops.testing import answer_of, make_case, relative_error, truth

DEFAULTS = {
    "group": None,
    "vocab_start": 0,
    "vocab_size": None,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
}


def chunked_loss(hidden, heads, gate_logits, target, *, buffer_bytes=None, epilogue=None, **options):
    problem = checked_problem(hidden, heads, gate_logits, target, **(DEFAULTS | options))
    return chunked.mixture_loss(problem, buffer_bytes=buffer_bytes, epilogue=epilogue)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 36, 37, 1000])
def test_any_chunk_size_gives_the_same_answer(rows_per_chunk, reduction):
    case = make_case(
        21, rows=37, vocab=50, widths=(4, 3), dtype=torch.float64, padding=2, reduction=reduction, label_smoothing=0.1
    )
    answer = answer_of(chunked_loss, case, buffer_bytes=rows_per_chunk * 50 * 8)
    expected = truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_head_gradients_do_not_grow_worse_with_the_number_of_chunks(dtype):
    """64 chunks of one row each, summed in fp32 and rounded once: the error is one rounding, not sixty-four."""
    case = make_case(22, rows=64, vocab=50, widths=(8, 6), dtype=dtype, reduction="sum")
    answer = answer_of(chunked_loss, case, buffer_bytes=50 * 4)
    rounding = torch.finfo(dtype).eps / 2
    for j, gradient in enumerate(answer.heads):
        assert relative_error(gradient, truth(case).heads[j]) <= 2 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_pytorch_epilogue_is_a_twin_of_the_compiled_one(dtype):
    case = make_case(23, rows=37, vocab=1500, widths=(8, 6), dtype=dtype, label_smoothing=0.1, z_loss=0.01)
    twin = answer_of(chunked_loss, case, epilogue=TorchEpilogue(dtype))
    compiled = answer_of(chunked_loss, case)
    tolerance = 20 * torch.finfo(dtype).eps
    assert relative_error(compiled.loss, twin.loss) <= tolerance
    for name, gradient in compiled.gradients().items():
        assert relative_error(gradient, twin.gradients()[name]) <= tolerance, name


@pytest.mark.parametrize("vocab", [1000, 3], ids=["logits weigh most", "hidden states weigh most"])
def test_what_grows_with_a_chunk_stays_within_its_budget(vocab):
    case = make_case(24, rows=4096, vocab=vocab, widths=(40, 30))
    problem = checked_problem(case.hidden, case.heads, case.gate_logits, case.target, **DEFAULTS)
    plan = chunked.Plan(problem, buffer_bytes=1 << 20)
    logits, inputs, d_inputs = vocab * 4, 70 * 4, 70 * 4  # bytes per row
    assert plan.chunk_rows * (plan.buffers * (logits + inputs) + d_inputs) <= 1 << 20
    assert plan.chunk_rows * (logits + inputs + d_inputs) > 1 << 19  # and makes use of it
    assert [(c.start, c.stop) for c in plan.chunks(5)] == [(0, 5)]
    covered = [row for c in plan.chunks(4096) for row in range(c.start, c.stop)]
    assert covered == list(range(4096))
