"""The Triton epilogue without a GPU: interpreted, against its twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import answer_of, make_case, rule_violations

from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue


def kernels_on(logits: Any, target: Any, row_max: Any, coefficients: Any, dtype: torch.dtype) -> Any:
    from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue

    epilogue = TritonEpilogue(dtype)
    statistics, scratch = epilogue.statistics(logits, target, keep=True)
    return statistics, epilogue.dlogits(logits, scratch, target, row_max, coefficients).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 333, 4096, 9000])
def test_kernels_equal_the_twin(columns: int, dtype: Any, interpreted: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, columns + 7, generator=draw) * 4)[:, :columns]
    target = torch.tensor([-1, 0, columns - 1])
    coefficients = tuple(torch.rand(3, 3, generator=draw))
    twin = TorchEpilogue(torch.float32)
    expected, _ = twin.statistics(logits, target, keep=True)
    row_max = expected[:, 0] + 0.5
    statistics, gradient = interpreted(kernels_on, logits.clone(), target, row_max, coefficients, dtype)
    torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=1e-6)
    expected_gradient = twin.dlogits(logits.clone(), None, target, row_max, coefficients)
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=rounding, atol=1e-6)


def mixture_kernel_on(logits: Any, weights: Any, target: Any) -> Any:
    from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue

    return TritonEpilogue(torch.bfloat16).mixture_statistics(logits, weights, target)


@pytest.mark.parametrize(("specialists", "columns"), [(1, 333), (2, 1), (3, 2500), (5, 1024)])
def test_mixture_kernel_equals_the_twin(specialists: Any, columns: Any, interpreted: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(specialists, 3, columns + 7, generator=draw)[:, :, :columns] * 4
    weights = torch.softmax(torch.randn(3, specialists, generator=draw), 1)
    target = torch.tensor([-1, 0, columns - 1])
    expected = TorchEpilogue(torch.float32).mixture_statistics(logits, weights, target)
    torch.testing.assert_close(interpreted(mixture_kernel_on, logits, weights, target), expected, rtol=1e-4, atol=1e-3)


def mixture_gradients_on(dtype: torch.dtype, logits: Any, *given: Any) -> Any:
    """The gradients in their planes, with the sums of exponentials that the statistics' kernel found of them."""
    from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue

    sums = TritonEpilogue(dtype).mixture_statistics(logits, given[0], given[1])[:, 1]
    return TritonEpilogue(dtype).mixture_dlogits(logits, *given).clone(), sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("specialists", "columns"), [(1, 333), (2, 1), (3, 2500), (5, 1024)])
def test_mixture_gradients_equal_the_twins(specialists: Any, columns: Any, dtype: Any, interpreted: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(specialists, 3, columns + 7, generator=draw)[:, :, :columns] * 4
    weights = torch.softmax(torch.randn(3, specialists, generator=draw), 1)
    target = torch.tensor([-1, 0, columns - 1])
    coefficients = torch.rand(3, 3, generator=draw)
    coefficients[:, 1] = 0.0  # a row that counts nothing
    logits[:, 1] = torch.nan
    given = (weights, target, torch.full((3,), 20.0), tuple(coefficients))
    expected = TorchEpilogue(torch.float32).mixture_dlogits(logits.clone(), *given)
    found, _ = interpreted(mixture_gradients_on, dtype, logits, *given)
    assert torch.count_nonzero(found[:, 1]) == 0
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=1e-6)


def test_a_mixtures_exponentials_add_up_to_the_sum_of_its_statistics_at_any_offset(interpreted: Any) -> None:
    """A last bit of a logit of 1e6 is 6 % of a probability: both kernels form the same bits of it."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 5, 2500, generator=draw) + 1e6
    weights = torch.softmax(torch.randn(5, 3, generator=draw), 1)
    top, one, zero = (logits * weights.t()[:, :, None]).sum(0).amax(1) + 1, torch.ones(5), torch.zeros(5)
    given = (weights, torch.full((5,), -1), top, (one, zero, zero))
    planes, sums = interpreted(mixture_gradients_on, torch.float32, logits, *given)
    shifts = planes.sum((0, 2)) / sums  # exp(the kernel's maximum - top): a whole number of steps of 1 / 16
    steps = shifts.log() * 16
    torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=1e-3)


def planes_beyond_32_bits(file: str) -> tuple[Any, Any]:
    """What the kernel and its twin make of planes 2^30 numbers apart, in a file that is mostly holes. A distance of
    2^31 that wraps around leads 2^31 numbers before the first one: into a hole."""
    storage = torch.UntypedStorage.from_file(file, shared=True, nbytes=(2**32 + 2**12) * 4)
    logits = torch.empty(0).set_(
        storage,  # type: ignore[arg-type]
        2**31,
        (3, 2, 50),
        (2**30 + 64, 64, 1),
    )
    logits.copy_(torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)))
    weights, target = torch.full((2, 3), 1 / 3), torch.tensor([7, 49])
    twin = TorchEpilogue(torch.float32).mixture_statistics(logits.contiguous(), weights, target)
    return mixture_kernel_on(logits, weights, target), twin


def test_planes_may_lie_further_apart_than_32_bits_can_count(interpreted: Any, tmp_path: Any) -> None:
    found, twin = interpreted(planes_beyond_32_bits, str(tmp_path / "planes"))
    torch.testing.assert_close(found, twin, rtol=1e-4, atol=1e-4)


def test_ignored_rows_and_masked_words_are_exact(interpreted: Any) -> None:
    logits = torch.randn(2, 50)
    logits[0] = torch.nan
    logits[1, :20] = -torch.inf
    zero_one = torch.tensor([0.0, 1.0])
    statistics, gradient = interpreted(
        kernels_on,
        logits,
        torch.tensor([-1, 30]),
        torch.tensor([0.0, 3.0]),
        (zero_one, zero_one, 0 * zero_one),
        torch.bfloat16,
    )
    assert torch.count_nonzero(gradient[0]) == 0 and torch.count_nonzero(gradient[1, :20]) == 0
    assert torch.isfinite(gradient).all() and torch.isfinite(statistics[1, :3]).all()


def chunked_answer(case: Any) -> Any:
    from ultrafuser_mega.ops import chunked
    from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue
    from ultrafuser_mega.ops.problem import checked_problem

    def loss(hidden: Any, heads: Any, gate_logits: Any, target: Any, *, reduction: Any = "mean", **options: Any) -> Any:
        defaults = {"group": None, "vocab_start": 0, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
        problem = checked_problem(hidden, heads, gate_logits, target, reduction=reduction, **(defaults | options))
        return chunked.mixture_loss(problem, epilogue=TritonEpilogue(hidden[0].dtype), buffer_bytes=16 << 10)[0]

    return answer_of(loss, case)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_whole_gpu_path_stays_within_the_rule_of_plain_pytorch(
    dtype: Any, reduction: str, interpreted: Any
) -> None:
    """As on a GPU: 16-bit operands, fp32 logits and sums, dz written in place in 16 bits."""
    case = make_case(
        41, rows=40, vocab=333, widths=(16, 24), dtype=dtype, reduction=reduction, label_smoothing=0.1, z_loss=1e-3
    )
    assert rule_violations(interpreted(chunked_answer, case), case) == []
