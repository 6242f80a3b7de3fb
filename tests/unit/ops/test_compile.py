"""torch.compile traces through the loss without a graph break, and its operators pass PyTorch's own check."""

from __future__ import annotations

import pytest
import torch

from ultrafuser_mega.ops import mixture_cross_entropy
from ultrafuser_mega.ops.registered import mixture_forward
from ultrafuser_mega.ops.testing import answer_of, make_case, relative_error, truth

EVERYTHING, GATE = (True, True, True), (True, False, False)


@pytest.mark.parametrize("needs", [EVERYTHING, GATE, (False, True, False)], ids=["everything", "gate", "hidden"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_graph_forward_and_backward_with_the_same_answer(reduction, needs):
    torch.compiler.reset()
    case = make_case(91, rows=12, vocab=30, widths=(4, 3), dtype=torch.float64, reduction=reduction, z_loss=0.01)
    compiled = torch.compile(mixture_cross_entropy, fullgraph=True, backend="aot_eager")
    answer, expected = answer_of(compiled, case, needs), truth(case)
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    assert len(answer.gradients()) == needs[0] + 2 * needs[1] + 2 * needs[2]
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-12, name


@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["everything", "gate"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, needs):
    case = make_case(92, rows=6, vocab=9, widths=(4, 3), reduction=reduction)
    gate = case.gate_logits.requires_grad_(needs[0])
    hidden = [states.requires_grad_(needs[1]) for states in case.hidden]
    heads = [head.requires_grad_(needs[2]) for head in case.heads]
    flags = [needs[0], *[needs[1]] * 2, *[needs[2]] * 2]
    backend = "chunked" if needs[2] else "gate_only"
    arguments = (case.target, gate, hidden, heads, flags, backend, "", 0, 9, -100, reduction, 0.1, 0.01)
    torch.library.opcheck(mixture_forward, arguments)
