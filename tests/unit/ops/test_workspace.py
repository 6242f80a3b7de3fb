"""Memory that calls of the loss hand on: the same piece where one is free, never the same to two at a time."""

from __future__ import annotations

from typing import Any

import torch
from support.mixture_cases import Case, make_case, relative_error, truth, upstream_of

from ultrafuser_mega.ops import Workspace, mixture_cross_entropy

CPU = torch.device("cpu")


def begun(case: Case, workspace: Workspace) -> tuple[torch.Tensor, list[Any]]:
    """(the loss, what its backward gives gradients to)."""
    leaves = [t.clone().requires_grad_() for t in (*case.hidden, *case.heads)]
    n = len(case.hidden)
    loss = mixture_cross_entropy(
        leaves[:n], leaves[n:], case.gate_logits, case.target, **case.options, workspace=workspace
    )
    return loss, leaves


def right(case: Case, leaves: list[Any]) -> bool:
    expected = truth(case)
    pairs = zip(leaves, (*expected.hidden, *expected.heads), strict=True)
    return all(relative_error(leaf.grad, gradient) <= 1e-12 for leaf, gradient in pairs)


def test_what_was_given_back_is_taken_again_where_it_suffices() -> None:
    workspace = Workspace()
    first = workspace.take(100, torch.float32, CPU)
    workspace.give(first)
    again = workspace.take(60, torch.float32, CPU)
    assert again.data_ptr() == first.data_ptr() and len(again) == 60
    workspace.give(again)
    assert workspace.take(100, torch.float32, CPU).data_ptr() == first.data_ptr(), "all of it was kept"
    workspace.give(first)
    assert len(workspace.take(101, torch.float32, CPU)) == 101
    workspace.give(first)
    assert workspace.take(1, torch.float64, CPU).dtype == torch.float64


def test_what_is_in_use_is_not_given_to_another() -> None:
    workspace = Workspace()
    first, second = (workspace.take(10, torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


def test_losses_whose_backwards_come_in_any_order_do_not_disturb_each_other() -> None:
    workspace = Workspace()
    cases = [make_case(seed, rows=21, vocab=40, widths=(4, 3), dtype=torch.float64) for seed in (31, 32, 33)]
    for order in ((0, 1, 2), (2, 0, 1)):
        runs = [begun(case, workspace) for case in cases]
        for i in order:
            runs[i][0].backward(upstream_of(cases[i]))
        for case, (_, leaves) in zip(cases, runs, strict=True):
            assert right(case, leaves)


def test_a_second_backward_of_the_same_graph_is_right_though_the_memory_is_another_loss_s_by_then() -> None:
    workspace = Workspace()
    first, second = (make_case(seed, rows=21, vocab=40, widths=(4, 3), dtype=torch.float64) for seed in (34, 35))
    loss, leaves = begun(first, workspace)
    loss.backward(upstream_of(first), retain_graph=True)
    other, others = begun(second, workspace)
    for leaf in leaves:
        leaf.grad = None
    loss.backward(upstream_of(first))
    other.backward(upstream_of(second))
    assert right(first, leaves) and right(second, others)
