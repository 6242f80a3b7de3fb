"""Real vocabulary sizes and row counts, every specialist count, type and kind of value, in a set that covers pairs.

Widths are tiny: what breaks at V = 151936 or N = 4096 is the softmax and the cutting into blocks, not the width.
Everything is held to the rule of plain PyTorch in the same type (mixture_cases.Rule).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.mixture_cases import IGNORE, Case, Rule, answer_of, make_case

from ultrafuser_mega.ops import mixture_cross_entropy

EVERYTHING, GATE = (True, True, True), (True, False, False)
BACKENDS = [("reference", EVERYTHING), ("chunked", EVERYTHING), ("chunked", GATE), ("gate_only", GATE)]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

CASES = [  # vocabulary, rows, widths, type, values, reduction
    (32000, 0, (4, 3), FP32, "ordinary", "mean"),
    (32000, 1, (8,), BF16, "masked", "none"),
    (32000, 17, (4, 3, 5), FP32, "saturated", "mean"),
    (32000, 17, (2, 4, 1, 3, 5), FP16, "ordinary", "sum"),
    (32016, 0, (4, 3, 5), BF16, "ordinary", "none"),
    (32016, 1, (3, 1, 4, 2, 2), FP32, "ordinary", "sum"),
    (32016, 17, (4, 6), BF16, "saturated", "mean"),
    (32016, 17, (6,), FP32, "masked", "none"),
    (151936, 0, (4,), FP16, "ordinary", "sum"),
    (151936, 1, (4, 3), FP32, "masked", "mean"),
    (151936, 1, (4, 3, 2), FP16, "saturated", "none"),
    (151936, 17, (4, 3, 5), BF16, "ordinary", "mean"),
    (333, 4096, (4, 3, 5), FP32, "masked", "mean"),
    (333, 4096, (3, 2, 4, 1, 2), BF16, "ordinary", "none"),
    (7, 4096, (2, 3), FP16, "saturated", "sum"),
    (1, 4096, (2,), FP32, "z-loss", "mean"),
]


def case_of(vocab: int, rows: int, widths: tuple[int, ...], dtype: torch.dtype, values: str, reduction: str) -> Case:
    options: dict[str, Any] = {"rows": rows, "vocab": vocab, "widths": widths, "dtype": dtype}
    options |= {"reduction": reduction, "z_loss": 1e-4}
    match values:
        case "saturated":
            return make_case(111, **options, gate_scale=200.0, padding=5, label_smoothing=0.1)
        case "masked":
            return masked(make_case(112, **options, padding=5))
        case (
            "z-loss"
        ):  # with V = 1 nothing else is left of the gradient; a small one would drown in the rounding of 1 - 1
            return make_case(115, **(options | {"z_loss": 0.1}), padding=5)
        case _:
            return make_case(113, **options, padding=5, label_smoothing=0.1)


def masked(case: Case) -> Case:
    """Every second word gets logits of -1e30, as a mask on the vocabulary gives; no target is one of them."""
    for states, head in zip(case.hidden, case.heads, strict=True):
        states[:, 0] = 1.0
        head[1 : case.options["vocab_size"] : 2] = 0.0
        head[1 : case.options["vocab_size"] : 2, 0] = -1e30
    case.target[case.target != IGNORE] &= ~1
    return case


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_every_backend_stays_within_the_rule_of_plain_pytorch(shape: Any) -> None:
    case = case_of(*shape)
    rule = Rule(case)
    for backend, needs in BACKENDS:
        answer = answer_of(mixture_cross_entropy, case, needs, backend=backend)
        assert rule.violations(answer, gate_alone=backend == "gate_only") == [], (backend, needs)
        if shape[4] == "masked" and needs == EVERYTHING:
            assert all(torch.count_nonzero(head[1::2]) == 0 for head in answer.heads)


@pytest.mark.parametrize(("backend", "needs"), [("chunked", EVERYTHING), ("gate_only", GATE)], ids=["all", "gate"])
def test_4096_rows_of_32000_words(backend: str, needs: Any) -> None:
    """64 rows repeated 64 times: the truth of the 64 is the truth of all, and only the answer pays for the size.

    Sums over words are held to the rule. In a sum over rows that repeat roundings repeat, too, and add up: there only
    the certain bound n u T holds in any order (mixture_cases.Roundings), with T below 4 times the sum's size here.
    """
    few = make_case(114, rows=64, vocab=32000, widths=(4, 3, 5), reduction="sum")
    repeats = 64
    many = Case(
        [states.repeat(repeats, 1) for states in few.hidden],
        few.heads,
        few.gate_logits.repeat(repeats, 1),
        few.target.repeat(repeats),
        few.options,
    )
    answer, rule = answer_of(mixture_cross_entropy, many, needs, backend=backend), Rule(few)
    rule.expected = replace(
        rule.expected,
        loss=rule.expected.loss * repeats,
        gate=rule.expected.gate.repeat(repeats, 1),
        hidden=[true.repeat(repeats, 1) for true in rule.expected.hidden],
        heads=[true * repeats for true in rule.expected.heads],
    )
    rule.allowed |= {f"heads[{j}]": 4 * 4096 * 2.0**-24 for j in range(3)}
    assert rule.violations(answer, gate_alone=backend == "gate_only") == []


def streamed(case: Case, needs: tuple[bool, bool, bool]) -> Any:
    """The streaming backend with the block sizes it ships with, for a process whose Triton interprets."""
    from ultrafuser_mega.ops import streaming
    from ultrafuser_mega.ops.problem import checked_problem

    def loss(hidden: Any, heads: Any, gate_logits: Any, target: Any, **options: Any) -> Any:
        options = {"group": None, "vocab_start": 0, "ignore_index": IGNORE, "label_smoothing": 0.0} | options
        return streaming.mixture_loss(checked_problem(hidden, heads, gate_logits, target, **options))[0]

    return answer_of(loss, case, needs)


@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["all", "gate"])
@pytest.mark.parametrize(
    "shape",
    [
        (7, 1061, (2, 3), FP16, "saturated", "sum"),
        pytest.param((7, 4096, (2, 3), FP16, "saturated", "sum"), marks=pytest.mark.slow),
        pytest.param((32000, 1, (4, 3), FP32, "saturated", "mean"), marks=pytest.mark.slow),
        pytest.param((32016, 37, (6,), FP32, "masked", "none"), marks=pytest.mark.slow),
        pytest.param((151936, 1, (4, 3), FP32, "masked", "mean"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interpreted_streaming_stays_within_the_rule_of_plain_pytorch(shape: Any, needs: Any, interpreted: Any) -> None:
    case = case_of(*shape)
    assert Rule(case).violations(interpreted(streamed, case, needs), gate_alone=needs == GATE) == []
