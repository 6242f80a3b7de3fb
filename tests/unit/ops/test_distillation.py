"""The distillation loss against its definition in float64: values, gradients, shards, extreme logits, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distillation_cases import Lesson, answer_of, make_lesson, truth, violations
from support.mixture_cases import IGNORE, relative_error

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import Workspace, distillation_loss
from ultrafuser_mega.runtime.spawn import run_ranks

SMALL: dict[str, Any] = {"rows": 41, "vocab": 333, "widths": (16, 24, 8), "width": 20, "padding": 5}
KINDS = [
    {"temperature": 1.0, "reverse": 0.0, "labels": 0.0},
    {"temperature": 0.5, "reverse": 0.0, "labels": 0.3},
    {"temperature": 2.0, "reverse": 1.0, "labels": 0.0},
    {"temperature": 4.0, "reverse": 0.4, "labels": 0.2},
    {"temperature": 1.0, "reverse": 0.7, "labels": 0.1},
    {"temperature": 3.0, "reverse": 0.0, "labels": 1.0},
]
CHUNKS = 40 << 10  # bytes, which make several chunks of these rows


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients_are_those_of_the_definition(dtype: torch.dtype, kind: dict[str, float]) -> None:
    lesson = make_lesson(3, **SMALL, dtype=dtype, options=kind)
    for buffer_bytes in (None, CHUNKS):
        assert violations(answer_of(distillation_loss, lesson, buffer_bytes=buffer_bytes), lesson) == []
    if dtype == torch.float64:
        found, expected = answer_of(distillation_loss, lesson), truth(lesson)
        assert max(relative_error(found[name], value) for name, value in expected.items()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_a_vocabulary_and_memory_handed_on_change_nothing(dtype: torch.dtype) -> None:
    """On a CPU the vocabulary goes in blocks of 1024 words, here three of them and words that are padding."""
    workspace = Workspace()
    for kind in KINDS:
        lesson = make_lesson(17, **(SMALL | {"vocab": 2500}), dtype=dtype, options=kind)
        for buffer_bytes in (None, 600 << 10):
            found = answer_of(distillation_loss, lesson, buffer_bytes=buffer_bytes, workspace=workspace)
            assert violations(found, lesson) == []
            if dtype == torch.float64:
                assert max(relative_error(found[name], value) for name, value in truth(lesson).items()) < 1e-12


def test_a_sum_of_rows_is_a_sum() -> None:
    lesson = make_lesson(4, **SMALL, options={"reduction": "sum", "temperature": 2.0, "labels": 0.5})
    assert violations(answer_of(distillation_loss, lesson), lesson) == []


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    lesson = make_lesson(5, rows=30, vocab=200, widths=(16,), width=16)
    lesson = replace(lesson, hidden=lesson.teacher.hidden[0], head=lesson.teacher.heads[0])
    for reverse in (0.0, 0.5, 1.0):
        found = answer_of(distillation_loss, lesson.with_options(reverse=reverse, temperature=2.0))
        # log p - log q is 0 but for the roundings of two equal sums of 200 terms
        assert found["divergence"].abs().max() < 200 * 2.0**-24
        assert found["hidden"].abs().max() < 1e-6 and found["head"].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_are_ignored_receive_exactly_nothing_whatever_they_hold(dtype: torch.dtype) -> None:
    lesson = make_lesson(6, **SMALL, dtype=dtype, options={"reverse": 0.5, "labels": 0.2, "temperature": 2.0})
    ignored = lesson.teacher.target == IGNORE
    assert 0 < int(ignored.sum()) < len(ignored)
    expected = answer_of(distillation_loss, lesson)
    lesson.hidden[ignored] = torch.nan
    for states in lesson.teacher.hidden:
        states[ignored] = torch.inf
    found = answer_of(distillation_loss, lesson)
    assert torch.count_nonzero(found["hidden"][ignored]) == 0 and torch.count_nonzero(found["rows"][ignored]) == 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    lesson.teacher.target[:] = IGNORE
    nothing = answer_of(distillation_loss, lesson)
    assert all(torch.count_nonzero(value) == 0 for value in nothing.values())


def test_no_rows_give_no_loss_and_gradients_of_zero() -> None:
    lesson = make_lesson(7, **(SMALL | {"rows": 0}))
    found = answer_of(distillation_loss, lesson)
    assert float(found["loss"]) == 0.0 and found["rows"].shape == (0,)
    assert torch.count_nonzero(found["head"]) == 0


@pytest.mark.parametrize("reverse", [0.0, 0.5, 1.0])
def test_large_logits_cost_no_more_than_they_lose_themselves(reverse: float) -> None:
    """With an offset of 1e4 a logit of fp32 has lost 1e-3, one of bf16 products as much again: plain PyTorch, which
    the rule compares with, loses the same."""
    for offset in (1e4, -1e4):
        lesson = make_lesson(8, **SMALL, common_offset=offset, options={"reverse": reverse, "labels": 0.2})
        found = answer_of(distillation_loss, lesson)
        assert all(bool(value.isfinite().all()) for value in found.values())
        # The sum over T of |terms| of a logit is at most 2 |offset|; in any order its 68 additions err by 2^-24 each.
        logit = 2 * 1e4 * 68 * 2.0**-24
        assert float((found["rows"] - truth(lesson)["rows"]).abs().max()) < 8 * logit
    huge = make_lesson(9, **SMALL, logit_scale=3e4, options={"reverse": reverse})
    found = answer_of(distillation_loss, huge)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert relative_error(found["rows"], truth(huge)["rows"]) < 1e-4


def test_a_gate_of_minus_infinity_chooses_a_teacher_per_row() -> None:
    lesson = make_lesson(10, **SMALL, options={"labels": 0.9})
    choice = torch.arange(41) % 3
    gate = torch.full((41, 3), -torch.inf)
    gate[torch.arange(41), choice] = 0.0
    chosen = replace(lesson, teacher=replace(lesson.teacher, gate_logits=gate))
    assert violations(answer_of(distillation_loss, chosen), chosen) == []


def test_a_word_that_the_teacher_rules_out_counts_nothing() -> None:
    """A logit of -inf on a whole column, made by a hidden unit of 1 against a weight of -inf."""
    lesson = make_lesson(11, rows=20, vocab=50, widths=(8,), width=8, ignored=0.0)
    lesson.teacher.hidden[0][:, 0] = 1.0
    lesson.teacher.heads[0][7:10, 0] = -torch.inf
    for temperature in (1.0, 2.0):
        found = answer_of(distillation_loss, lesson.with_options(temperature=temperature))
        expected = truth(lesson.with_options(temperature=temperature))
        for name in ("loss", "rows", "hidden", "head"):
            assert relative_error(found[name], expected[name]) < 1e-5, name


STARTS = [0, 0, 120, 200, 338]  # the first rank has no rows, the last some that are padding


def shard_of(lesson: Lesson, rank: int) -> tuple[Lesson, dict[str, Any]]:
    rows = slice(STARTS[rank], STARTS[rank + 1])
    teacher = replace(lesson.teacher, heads=[head[rows] for head in lesson.teacher.heads])
    return replace(lesson, teacher=teacher, head=lesson.head[rows]), {
        "group": dist.group.WORLD, "vocab_start": STARTS[rank], "buffer_bytes": CHUNKS,
    }  # fmt: skip


def _on_shard(rank: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    answers = []
    for kind in KINDS:
        lesson, shard = shard_of(make_lesson(12, **SMALL, dtype=dtype, options=kind), rank)
        answers.append(answer_of(distillation_loss, lesson, **shard))
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_vocabulary_in_shards_gives_the_same_loss_everywhere_and_parts_of_the_gradients(dtype: torch.dtype) -> None:
    ranks = run_ranks(_on_shard, 4, dtype)
    for index, kind in enumerate(KINDS):
        parts = [answers[index] for answers in ranks]
        lesson = make_lesson(12, **SMALL, dtype=dtype, options=kind)
        for part in parts:
            assert part["loss"].equal(parts[0]["loss"]) and part["rows"].equal(parts[0]["rows"])
        # each of four parts of the hidden states' gradient is rounded to its type: as much as their sum's error may be
        whole = parts[0] | {
            "hidden": torch.stack([part["hidden"].double() for part in parts]).sum(0),
            "head": torch.cat([part["head"] for part in parts]),
        }
        rounding = 4 * torch.finfo(dtype).eps
        assert [line for line in violations(whole, lesson) if not line.startswith("hidden")] == []
        assert relative_error(whole["hidden"], truth(lesson)["hidden"]) < 1e-4 + rounding


def _far_apart(rank: int) -> dict[str, torch.Tensor]:
    lesson, shard = shard_of(far_apart(), rank)
    return answer_of(distillation_loss, lesson, **shard)


def far_apart() -> Lesson:
    """The teacher's words of one shard are all hundreds below those of another, the student's the other way round."""
    lesson = make_lesson(13, **SMALL, options={"reverse": 0.5, "temperature": 0.5})
    lesson.teacher.hidden[0][:, 0] = 1.0
    lesson.hidden[:, 0] = 1.0
    lesson.teacher.heads[0][:120, 0] = -900.0
    lesson.head[200:, 0] = -300.0
    return lesson


def test_shards_whose_words_hardly_come_still_count_in_the_other_models_divergence() -> None:
    for part in run_ranks(_far_apart, 4):
        expected = truth(far_apart())
        assert relative_error(part["rows"], expected["rows"]) < 1e-5
        assert relative_error(part["divergence"], expected["divergence"]) < 1e-5


def test_without_gradients_the_rows_are_the_same_and_nothing_is_kept() -> None:
    lesson = make_lesson(14, **SMALL)
    teacher = lesson.teacher
    arguments = (lesson.hidden, lesson.head, teacher.hidden, teacher.heads, teacher.gate_logits, teacher.target)
    found = distillation_loss(*arguments, **teacher.options)
    assert not found.loss.requires_grad
    assert found.row_losses.equal(answer_of(distillation_loss, lesson)["rows"])


def test_a_frozen_head_costs_no_gradient_and_a_second_backward_gives_the_same() -> None:
    lesson = make_lesson(15, **SMALL, options={"labels": 0.3})
    teacher, hidden = lesson.teacher, lesson.hidden.clone().requires_grad_()
    loss = distillation_loss(
        hidden, lesson.head, teacher.hidden, teacher.heads, teacher.gate_logits, teacher.target,
        **teacher.options, labels=0.3,
    ).loss  # fmt: skip
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    first, hidden.grad = hidden.grad, None
    loss.backward()
    assert hidden.grad is not None and hidden.grad.equal(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0 must be above 0"),
        ({"temperature": float("nan")}, "temperature: nan lies outside the positive numbers"),
        ({"reverse": 1.5}, r"reverse: 1.5 lies outside \[0, 1\]"),
        ({"labels": "many"}, "labels: 'many', needed a number"),
        ({"reduction": "none"}, "reduction: 'none' is none of mean, sum"),
        ({"hidden": torch.zeros(3, 20)}, r"hidden: shape \(3, 20\), needed \(41, d\)"),
        ({"head_weight": torch.zeros(338, 21)}, r"head_weight: shape \(338, 21\), needed \(338, 20\)"),
        ({"head_weight": torch.zeros(338, 20).bfloat16()}, "head_weight: torch.bfloat16 on cpu, needed torch.float32"),
        ({"gate_logits": torch.zeros(41, 3).requires_grad_()}, "gate_logits: requires a gradient, but the teacher is"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    lesson = make_lesson(16, **SMALL)
    arguments: dict[str, Any] = {
        "hidden": lesson.hidden, "head_weight": lesson.head, "teacher_hidden": lesson.teacher.hidden,
        "teacher_head_weight": lesson.teacher.heads, "gate_logits": lesson.teacher.gate_logits,
        "target": lesson.teacher.target,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        distillation_loss(**(arguments | lesson.teacher.options | change))
