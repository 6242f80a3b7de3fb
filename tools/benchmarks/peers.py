"""What one writes without this library, to be measured and compared beside it."""

from __future__ import annotations

from typing import Any

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
