"""Few words and many hidden units: the chunked backend keeps every specialist's logits in a plane of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import Case, answer_of, make_case, relative_error, rule_violations, truth, upstream_of

from ultrafuser_mega.ops import chunked, mixture_cross_entropy, planes
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue

SMALL: dict[str, Any] = {"rows": 37, "vocab": 50, "widths": (80, 120, 96), "padding": 3}
SMOOTH: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems that went this way."""
    problems: list[Any] = []

    def spy(problem: Any, *rest: Any) -> Any:
        problems.append(problem)
        return original(problem, *rest)

    original = planes.mixture_loss
    monkeypatch.setattr(planes, "mixture_loss", spy)
    return problems


def loss_of(*tensors: Any, **options: Any) -> torch.Tensor:
    return mixture_cross_entropy(*tensors, backend="chunked", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("widths", [(80, 120, 96), (30,), (300,) * 5], ids=["three", "one", "five"])
def test_loss_and_gradients_are_those_of_float64(widths: Any, reduction: str, taken: Any) -> None:
    case = make_case(211, **(SMALL | {"widths": widths}), dtype=torch.float64, reduction=reduction, **SMOOTH)
    answer, expected = answer_of(loss_of, case), truth(case)
    assert len(taken) == 1
    assert relative_error(answer.loss, expected.loss) <= 1e-12
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{}, {"gate_scale": 200.0}, {"common_offset": 1e5}, {"ignored": 2.0}], ids=str)
def test_the_rule_of_plain_pytorch_holds_for_every_type_and_for_a_gate_that_trains_alone(
    change: Any, dtype: Any, taken: Any
) -> None:
    """The gate's gradient loses nothing to what all logits have in common, although the heads train with it."""
    case = make_case(212, **SMALL, dtype=dtype, **SMOOTH, **change)
    assert rule_violations(answer_of(loss_of, case), case, gate_alone=True) == []
    assert len(taken) == 1


@pytest.mark.parametrize(
    "needs", [(True, True, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_is_wanted_is_given(needs: Any, taken: Any) -> None:
    case = make_case(213, **SMALL, dtype=torch.float64)
    answer, expected = answer_of(loss_of, case, needs), truth(case).gradients()
    assert len(taken) == 1
    wanted = {name for name in expected if needs[("gate", "hidden", "heads").index(name.split("[")[0])]}
    assert answer.gradients().keys() == wanted
    for name in wanted:
        assert relative_error(answer.gradients()[name], expected[name]) <= 1e-11, name


def test_ignored_rows_may_hold_anything(taken: Any) -> None:
    case = make_case(214, **SMALL)
    clean = answer_of(loss_of, case)
    for states in case.hidden:
        states[case.target == -100] = torch.nan
    answer = answer_of(loss_of, case)
    assert len(taken) == 2
    for name, gradient in answer.gradients().items():
        assert torch.equal(gradient, clean.gradients()[name]), name
    assert torch.count_nonzero(answer.hidden[0][case.target == -100]) == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_bits_again(reduction: str, taken: Any) -> None:
    case = make_case(215, **SMALL, reduction=reduction)
    leaves = [t.requires_grad_() for t in (case.gate_logits, *case.hidden, *case.heads)]
    loss = loss_of(case.hidden, case.heads, case.gate_logits, case.target, **case.options)
    first, second = (torch.autograd.grad(loss, leaves, upstream_of(case), retain_graph=keep) for keep in (True, False))
    assert len(taken) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_gradients_are_added_unrounded(dtype: Any, taken: Any) -> None:
    case = make_case(216, **SMALL, dtype=dtype)
    buffers = [torch.full(head.shape, 3.0) for head in case.heads]
    answer = answer_of(loss_of, case, head_main_grad=buffers)
    assert len(taken) == 1 and answer.heads == [None] * 3
    for buffer, true in zip(buffers, truth(case).heads, strict=True):
        assert relative_error(buffer - 3.0, true) <= 2**-8
        assert torch.equal(buffer[50:], torch.full_like(buffer[50:], 3.0))


def test_words_without_data_or_too_small_for_fp16_and_vocabularies_larger_than_hidden_states_go_the_other_way(
    taken: Any,
) -> None:
    """Of an odd type, of few words and many rows, of no rows: still right, elsewhere."""
    for case in (
        make_case(217, **SMALL, dtype=torch.float16),
        make_case(217, **(SMALL | {"vocab": 900})),
        make_case(217, **(SMALL | {"rows": 0})),
    ):
        assert rule_violations(answer_of(loss_of, case), case) == []
    assert taken == []


def test_what_moves_fewer_bytes_is_taken() -> None:
    """bf16, three specialists of 5120 units: an eighth and a sixth of 32000 words, not a fifth."""
    assert planes.pay(4000, (5120,) * 3, 2, 4) and planes.pay(32000 // 6, (5120,) * 3, 2, 4)
    assert not planes.pay(32000 // 5, (5120,) * 3, 2, 4)
    assert planes.pay(128256, (4096,), 2, 4)  # one specialist has one plane either way


def test_planes_that_do_not_fit_are_left() -> None:
    case = make_case(218, **SMALL)
    held = planes.row_bytes(50, SMALL["widths"], 4, 4) * SMALL["rows"]
    assert held == 37 * (3 * 50 + 120) * 4
    problem = problem_of(case)
    epilogue = TorchEpilogue(torch.float32)
    assert planes.serve(problem, epilogue, held) and not planes.serve(problem, epilogue, held - 1)


def problem_of(case: Case) -> Any:
    from ultrafuser_mega.ops.problem import checked_problem

    options = {"group": None, "vocab_start": 0, "ignore_index": -100, "reduction": "mean"} | SMOOTH | case.options
    return checked_problem(case.hidden, case.heads, case.gate_logits, case.target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_pytorch_epilogue_is_a_twin_of_the_compiled_one(dtype: Any, taken: Any) -> None:
    case = make_case(219, **SMALL, dtype=dtype)

    def twins(hidden: Any, heads: Any, gate: Any, target: Any, **_options: Any) -> torch.Tensor:
        problem = problem_of(Case(hidden, heads, gate, target, case.options))
        return chunked.mixture_loss(problem, epilogue=TorchEpilogue(dtype))[0]

    def compiled(hidden: Any, heads: Any, gate: Any, target: Any, **_options: Any) -> torch.Tensor:
        return chunked.mixture_loss(problem_of(Case(hidden, heads, gate, target, case.options)))[0]

    mine, twin = answer_of(compiled, case), answer_of(twins, case)
    assert len(taken) == 2
    for name, gradient in mine.gradients().items():
        assert relative_error(gradient, twin.gradients()[name]) <= 20 * torch.finfo(dtype).eps, name
