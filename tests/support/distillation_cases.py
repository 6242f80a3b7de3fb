"""Cases of distillation, and the float64 truth of its loss and gradients, without autograd and without the code under
test: p, q and their divergences as they are written in a textbook, and the gradients that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from peers import plain_distillation
from support.mixture_cases import IGNORE, Case, make_case, relative_error
from torch import Tensor

UPSTREAM = 1.25


@dataclass(frozen=True)
class Lesson:
    """Inputs of one call: the teacher is a case of the mixture."""

    teacher: Case
    hidden: Tensor  # (N, d)
    head: Tensor  # (V_local, d)
    options: dict[str, Any]  # temperature, reverse, labels, reduction

    def with_options(self, **options: Any) -> Lesson:
        return replace(self, options=self.options | options)


def make_lesson(
    seed: int,
    *,
    rows: int,
    vocab: int,
    widths: tuple[int, ...],
    width: int,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
    **case: Any,
) -> Lesson:
    """The last of ``widths`` + ``width`` models, drawn as make_case draws them, is the student."""
    whole = make_case(seed, rows=rows, vocab=vocab, widths=(*widths, width), dtype=dtype, **case)
    teacher = Case(
        whole.hidden[:-1], whole.heads[:-1], whole.gate_logits[:, :-1].contiguous(), whole.target, whole.options
    )
    return Lesson(teacher, whole.hidden[-1], whole.heads[-1], options or {})


def truth(lesson: Lesson) -> dict[str, Tensor]:
    """loss (), rows (N,), divergence (N,), cross_entropy (N,), hidden (N, d), head (V_local, d) under UPSTREAM."""
    options, teacher = lesson.options, lesson.teacher
    vocab, t = teacher.options["vocab_size"], options.get("temperature", 1.0)
    beta, c = options.get("reverse", 0.0), options.get("labels", 0.0)
    kept = teacher.target != IGNORE
    weights = teacher.gate_logits.double().softmax(1)
    z = torch.zeros(len(kept), vocab, dtype=torch.float64, device=kept.device)
    for j, (states, head) in enumerate(zip(teacher.hidden, teacher.heads, strict=True)):
        alone = states.double() @ head.double()[:vocab].t()
        z += torch.where(weights[:, j, None] > 0, weights[:, j, None] * alone, 0.0)
    h, w = lesson.hidden.double(), lesson.head.double()[:vocab]
    rows, divergence, labels, ds = truth_of_logits(z, h @ w.t(), teacher.target, t, beta, c)
    factor = UPSTREAM * kept.double()
    if options.get("reduction", "mean") == "mean":
        factor = factor / max(1, int(kept.sum()))
    ds = torch.where(kept[:, None], factor[:, None] * ds, 0.0)
    rows, divergence, labels = (torch.where(kept, value, 0.0) for value in (rows, divergence, labels))
    loss = rows.sum() if options.get("reduction", "mean") == "sum" else rows.sum() / max(1, int(kept.sum()))
    head = torch.zeros(lesson.head.shape, dtype=torch.float64, device=kept.device)
    head[:vocab] = ds.t() @ torch.where(kept[:, None], h, 0.0)
    return {
        "loss": loss, "rows": rows, "divergence": divergence, "cross_entropy": labels, "hidden": ds @ w, "head": head
    }  # fmt: skip


def truth_of_logits(
    z: Tensor, s: Tensor, target: Tensor, t: float, beta: float, c: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, divergence, cross-entropy, each (N,); (N, V) gradient of the losses' sum) from the models' logits in
    float64, at temperature t with the shares beta of KL(q | p) and c of the labels."""
    log_p, log_q = (z / t).log_softmax(1), (s / t).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    forward = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
    against = torch.where(q > 0, log_q - log_p, 0.0) if beta else torch.zeros_like(q)  # infinite where p alone is 0
    reverse = (q * against).sum(1)
    words = torch.arange(s.shape[1], device=s.device)
    onehot = (words == target.clamp(min=0)[:, None]).double()
    labels = -torch.where(onehot > 0, s.log_softmax(1), 0.0).sum(1)
    divergence = (1 - beta) * forward + beta * reverse
    rows = (1 - c) * t**2 * divergence + c * labels
    ds = (1 - c) * t * ((1 - beta) * (q - p) + beta * q * (against - reverse[:, None])) + c * (s.softmax(1) - onehot)
    return rows, divergence, labels, ds


def answer_of(function: Any, lesson: Lesson, **more: Any) -> dict[str, Tensor]:
    """The same of ``function``, called as ops.distillation_loss is."""
    hidden, head = (tensor.clone().requires_grad_() for tensor in (lesson.hidden, lesson.head))
    teacher = lesson.teacher
    found = function(
        hidden, head, teacher.hidden, teacher.heads, teacher.gate_logits, teacher.target,
        **(teacher.options | lesson.options | more),
    )  # fmt: skip
    found.loss.backward(torch.tensor(UPSTREAM, dtype=found.loss.dtype, device=found.loss.device))
    assert hidden.grad is not None and head.grad is not None
    return {
        "loss": found.loss.detach(), "rows": found.row_losses, "divergence": found.divergence,
        "cross_entropy": found.cross_entropy, "hidden": hidden.grad, "head": head.grad,
    }  # fmt: skip


def violations(answer: dict[str, Tensor], lesson: Lesson) -> list[str]:
    """Where ``answer`` is further from the truth than the rule of mixture_cases.py allows; [] is a pass.

    Values err by at most 3 e + 1e-5 of their size, gradients by 2 e + 1e-4, where e is plain PyTorch's error in the
    same type. The yardstick of the scalar loss is that of the rows it is made of.
    """
    expected, plain = truth(lesson), answer_of(plain_distillation, lesson)
    errors = {name: relative_error(plain[name], value) for name, value in expected.items()}
    errors["loss"] = max(errors["loss"], errors["rows"])
    allowed = {name: 3 * e + 1e-5 for name, e in errors.items()}
    allowed |= {name: 2 * errors[name] + 1e-4 for name in ("hidden", "head")}
    found = {name: relative_error(value, expected[name]) for name, value in answer.items()}
    return [f"{name}: error {e:.3g} > {allowed[name]:.3g}" for name, e in found.items() if not e <= allowed[name]]
