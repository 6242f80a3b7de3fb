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
    eps, reduction = options.get("label_smoothing", 0.0), options.get("reduction", "mean")
    rows = F.cross_entropy(z, target, label_smoothing=eps, reduction="none")
    if options.get("z_loss"):
        rows = rows + options["z_loss"] * torch.logsumexp(z, 1).square() * (target != IGNORE)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (target != IGNORE).sum().clamp(min=1)
