"""What one writes without this library, to be measured and compared beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def plain_loss(
    hidden: list[Tensor], heads: list[Tensor], gate_logits: Tensor, target: Tensor, **options: Any
) -> Tensor:
    """What one writes without this library: n logit tensors in the model's dtype, mixed in fp32, F.cross_entropy."""
    vocab = options["vocab_size"]
    weights = torch.softmax(gate_logits, 1)
    z = sum(weights[:, j, None] * (states @ heads[j][:vocab].t()) for j, states in enumerate(hidden))
    assert isinstance(z, Tensor)
    return cross_entropy(z, target, **options)


def concatenated_loss(
    hidden: list[Tensor], heads: list[Tensor], gate_logits: Tensor, target: Tensor, **options: Any
) -> Tensor:
    """What one writes who has seen that the mixture is one linear layer: ONE product, then F.cross_entropy in fp32.

    The product and the gate-scaled inputs have the model's dtype. Both copies, of inputs and heads, are made anew in
    every call, because the heads train.
    """
    x, head = concatenated(hidden, [head[: options["vocab_size"]] for head in heads], gate_logits)
    z = x @ head.t()
    return cross_entropy(z.float() if z.dtype.itemsize < 4 else z, target, **options)


def concatenated(hidden: list[Tensor], heads: list[Tensor], gate_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture as one linear layer: (N, K) gate-scaled inputs and (V, K) heads."""
    weights = torch.softmax(gate_logits, 1)
    scaled = [(weights[:, j, None] * states).to(states.dtype) for j, states in enumerate(hidden)]
    return torch.cat(scaled, 1), torch.cat(heads, 1)


def cross_entropy(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """F.cross_entropy of logits (N, V) with the z-loss that it does not know."""
    eps, reduction = options.get("label_smoothing", 0.0), options.get("reduction", "mean")
    rows = F.cross_entropy(z, target, label_smoothing=eps, reduction="none")
    if options.get("z_loss"):
        rows = rows + options["z_loss"] * torch.logsumexp(z, 1).square() * (target != IGNORE)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (target != IGNORE).sum().clamp(min=1)


class PlainDistillation(NamedTuple):
    """What ops.DistillationLoss has."""

    loss: Tensor
    row_losses: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def plain_distillation(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: list[Tensor],
    teacher_heads: list[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    reverse: float = 0.0,
    labels: float = 0.0,
    reduction: str = "mean",
) -> PlainDistillation:
    """What one writes without this library: n + 1 logit tensors in the model's dtype, log_softmax of both in fp32,
    F.kl_div and F.cross_entropy."""
    with torch.no_grad():
        weights = torch.softmax(gate_logits, 1)
        z = sum(weights[:, j, None] * (h @ teacher_heads[j][:vocab_size].t()) for j, h in enumerate(teacher_hidden))
        assert isinstance(z, Tensor)
        log_p = (z / temperature).log_softmax(1)
    s = (hidden @ head[:vocab_size].t()).to(gate_logits.dtype)
    log_q = (s / temperature).log_softmax(1)
    divergence = torch.zeros_like(log_q[:, 0])
    if reverse < 1.0:
        divergence = (1.0 - reverse) * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    if reverse > 0.0:
        divergence = divergence + reverse * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    kept = target != IGNORE
    rows = (1.0 - labels) * temperature**2 * divergence
    with torch.set_grad_enabled(labels > 0.0):
        cross_entropy = F.cross_entropy(s, target, reduction="none")
    rows = torch.where(kept, rows + labels * cross_entropy, 0.0)
    loss = rows.sum() if reduction == "sum" else rows.sum() / kept.sum().clamp(min=1)
    return PlainDistillation(loss, rows.detach(), torch.where(kept, divergence.detach(), 0.0), cross_entropy.detach())
