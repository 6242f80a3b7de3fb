"""The distillation's Triton epilogue without a GPU: interpreted, against its twin and through the whole path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.distillation_cases import answer_of, make_lesson, violations

from ultrafuser_mega.ops.distillation_epilogue import TorchEpilogue
from ultrafuser_mega.ops.distillation_statistics import Mix

MIXES = [Mix(1.0, 0.0, 0.0), Mix(2.0, 1.0, 0.0), Mix(0.5, 0.4, 0.3)]


def kernels_on(teacher: Any, student: Any, target: Any, weight: Any, mix: Any, dtype: Any) -> Any:
    from ultrafuser_mega.ops.distillation_triton import TritonEpilogue

    epilogue = TritonEpilogue(dtype)
    statistics = epilogue.statistics(teacher, student, target, mix)
    return statistics, epilogue.dlogits(teacher, student, target, statistics, weight, mix).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 333, 4096, 9000])
def test_kernels_equal_the_twin(columns: int, dtype: Any, interpreted: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    for mix in MIXES:
        logits = torch.randn(2, 4, columns + 6, generator=draw) * 4
        teacher, student = logits[0, :, :columns], logits[1, :, :columns]
        target, weight = torch.tensor([-1, 0, columns - 1, columns // 2]), torch.tensor([0.3, 1.0, 0.0, 2.0])
        twin = TorchEpilogue(torch.float32)
        expected = twin.statistics(teacher, student, target, mix)
        found, gradient = interpreted(kernels_on, teacher.clone(), student.clone(), target, weight, mix, dtype)
        asked = [column for column in range(8) if bool((expected[:, column] != 0).any())]  # the rest is nobody's
        torch.testing.assert_close(found[:, asked], expected[:, asked], rtol=1e-4, atol=1e-4)
        wanted = twin.dlogits(teacher.clone(), student.clone(), target, expected, weight, mix)
        rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.float(), wanted, rtol=rounding, atol=1e-5)
        assert torch.count_nonzero(gradient[2]) == 0


def test_words_that_are_ruled_out_leave_numbers(interpreted: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 3, 9000, generator=draw).unbind()
    teacher[0, :5000] = -torch.inf  # the whole first block
    teacher[1, 10:20] = -torch.inf
    target, weight, mix = torch.tensor([6000, 5, -1]), torch.ones(3), Mix(1.0, 0.0, 0.5)
    twin = TorchEpilogue(torch.float32)
    expected = twin.statistics(teacher, student, target, mix)
    found, gradient = interpreted(kernels_on, teacher.clone(), student.clone(), target, weight, mix, torch.float32)
    torch.testing.assert_close(
        found[:, [0, 1, 2, 3, 4, 6, 7]], expected[:, [0, 1, 2, 3, 4, 6, 7]], rtol=1e-4, atol=1e-4
    )
    wanted = twin.dlogits(teacher.clone(), student.clone(), target, expected, weight, mix)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def lesson_answer(lesson: Any) -> Any:
    from ultrafuser_mega.ops import distillation_loss
    from ultrafuser_mega.ops.distillation_triton import TritonEpilogue

    epilogue = TritonEpilogue(lesson.hidden.dtype)
    return answer_of(distillation_loss, lesson, epilogue=epilogue, buffer_bytes=40 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_whole_gpu_path_stays_within_the_rule_of_plain_pytorch(dtype: Any, interpreted: Any) -> None:
    """As on a GPU: 16-bit operands, fp32 logits and sums, the gradient written in place in 16 bits."""
    for options in ({"reverse": 0.4, "labels": 0.2, "temperature": 2.0}, {}):
        lesson = make_lesson(31, rows=40, vocab=333, widths=(16, 24), width=20, dtype=dtype, options=options)
        assert violations(interpreted(lesson_answer, lesson), lesson) == []
