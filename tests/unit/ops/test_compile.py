"""torch.compile traces through the loss without a graph break, and its operators pass PyTorch's own check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import Case, answer_of, make_case, relative_error, truth

from ultrafuser_mega.ops import mixture_cross_entropy
from ultrafuser_mega.ops.registered import mixture_forward

EVERYTHING, GATE = (True, True, True), (True, False, False)


@pytest.mark.parametrize("needs", [EVERYTHING, GATE, (False, True, False)], ids=["everything", "gate", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_graph_forward_and_backward_with_the_same_answer(reduction: str, needs: Any) -> None:
    torch.compiler.reset()
    case = make_case(91, rows=12, vocab=30, widths=(4, 3), dtype=torch.float64, reduction=reduction, z_loss=0.01)
    compiled = torch.compile(mixture_cross_entropy, fullgraph=True, backend="aot_eager")
    answer, expected = answer_of(compiled, case, needs), truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    assert len(answer.gradients()) == needs[0] + 2 * needs[1] + 2 * needs[2]
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-12, name


def test_fp16_gradients_too_small_for_fp16_survive_until_the_loss_scale_is_known() -> None:
    """The mean of 4096 rows: a hidden state's gradient is about 1e-6, where fp16 is 3 % coarse."""
    torch.compiler.reset()
    case = make_case(93, rows=4096, vocab=50, widths=(16, 8), dtype=torch.float16, ignored=0.0)
    for states, head in zip(case.hidden, case.heads, strict=True):
        states.mul_(64.0)
        head.mul_(1 / 64)
    hidden = [states.requires_grad_() for states in case.hidden]
    compiled = torch.compile(mixture_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, case.heads, case.gate_logits, case.target)
    found = torch.autograd.grad(loss, hidden, torch.tensor(2.0**12))
    plain = [states.detach() for states in hidden]
    expected = truth(Case(plain, case.heads, case.gate_logits, case.target, case.options)).hidden
    for gradient, true in zip(found, expected, strict=True):
        assert float(true.abs().median()) < 2e-6
        assert relative_error(gradient, true / 1.25 * 2.0**12) <= 2**-11


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_of_the_operators_is_an_error_and_not_silently_nothing(reduction: str) -> None:
    torch.compiler.reset()
    case = make_case(94, rows=6, vocab=9, widths=(4, 3), reduction=reduction)
    inputs = [tensor.requires_grad_() for tensor in (case.gate_logits, *case.hidden, *case.heads)]
    compiled = torch.compile(mixture_cross_entropy, fullgraph=True, backend="eager")
    loss = compiled(inputs[1:3], inputs[3:], inputs[0], case.target, reduction=reduction)
    gradients = torch.autograd.grad(loss, inputs, torch.ones_like(loss), create_graph=True)
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(total, inputs, allow_unused=True)


@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["everything", "gate"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, needs: Any) -> None:
    case = make_case(92, rows=6, vocab=9, widths=(4, 3), reduction=reduction)
    gate = case.gate_logits.requires_grad_(needs[0])
    hidden = [states.requires_grad_(needs[1]) for states in case.hidden]
    heads = [head.requires_grad_(needs[2]) for head in case.heads]
    flags = [needs[0], *[needs[1]] * 2, *[needs[2]] * 2]
    backend = "chunked" if needs[2] else "gate_only"
    arguments = (case.target, gate, hidden, heads, flags, backend, "", 0, 9, -100, reduction, 0.1, 0.01)
    torch.library.opcheck(mixture_forward, arguments)
