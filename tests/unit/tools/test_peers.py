"""The peers compute the loss: what is measured beside the library must be a right answer to the same question."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import concatenated, concatenated_loss, plain_loss
from support.mixture_cases import Case, answer_of, make_case, relative_error, truth

SHAPE: dict[str, Any] = {"rows": 9, "vocab": 37, "widths": (12, 8, 16), "padding": 3}


@pytest.mark.parametrize("peer", [plain_loss, concatenated_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_the_closed_form_in_float64(peer: Any, reduction: str) -> None:
    case = make_case(
        5, **SHAPE, dtype=torch.float64, reduction=reduction, label_smoothing=0.1, z_loss=1e-3, logit_scale=4.0
    )
    answer, expected = answer_of(peer, case), truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    assert answer.gradients().keys() == expected.gradients().keys()
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_gemm_rounds_inputs_and_logits_once_each_to_the_models_type(dtype: Any) -> None:
    """A row's loss moves by at most twice what its logits do; those are rounded where the docstring says, and nowhere
    else but in a sum of K fp32 products."""
    case = make_case(6, **SHAPE, dtype=dtype, ignored=0.0, reduction="none")
    error = (answer_of(concatenated_loss, case, (False, False, False)).loss.double() - truth(case).loss).abs()
    assert bool((error <= 2 * error_of_logits(case, dtype).amax(1) + 1e-6).all())


def error_of_logits(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """(N, V): bound on what rounding does to every logit."""
    heads = [head[: case.options["vocab_size"]].double() for head in case.heads]
    x, head = concatenated([states.double() for states in case.hidden], heads, case.gate_logits.double())
    magnitude = x.abs() @ head.abs().t()
    unit, single = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    inputs_and_logits = 2 * unit * (1 + unit) * magnitude
    sums_and_weights = (x.shape[1] + 8) * single * magnitude
    return inputs_and_logits + sums_and_weights
