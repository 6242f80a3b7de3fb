"""gate_scale.py in plain PyTorch: the twin that the CUDA kernels are tested against, and the path on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_inputs(
    gate_logits: Tensor,  # (C, n)
    kept: Tensor,  # (C,)
    hidden: Sequence[Tensor],  # n x (C, d_j)
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    ignored = ~kept[:, None]
    gate_weights = torch.softmax(gate_logits.masked_fill(ignored, 0.0), dim=1)
    inputs = []
    for j, states in enumerate(hidden):
        x = torch.empty_like(states, dtype=dtype, memory_format=torch.contiguous_format)
        torch.mul(states, gate_weights[:, j, None], out=x)
        inputs.append(x.masked_fill_(ignored, 0.0))  # what an ignored row holds, even NaN, must not matter
    return gate_weights, inputs


def unscale_gradients(
    gate_weights: Tensor,  # (C, n)
    kept: Tensor,  # (C,)
    hidden: Sequence[Tensor],  # n x (C, d_j)
    d_inputs: Sequence[Tensor | None],  # n x (C, d_j)
    d_hidden: Sequence[Tensor | None],  # n x (C, d_j) out
    d_gate: Tensor | None,  # (C, n) out
) -> None:
    weight_gradients = []  # n x (C,): dw_j
    for j, (states, dx, out) in enumerate(zip(hidden, d_inputs, d_hidden, strict=True)):
        if dx is None:
            continue
        if d_gate is not None:
            weight_gradients.append((states * dx).sum(1))
        if out is not None:
            torch.mul(dx, gate_weights[:, j, None], out=out)
    if d_gate is not None:
        dw = torch.stack(weight_gradients, dim=1).masked_fill_(~kept[:, None], 0.0)  # (C, n)
        differences = dw[:, :, None] - dw[:, None, :]  # (C, n, n)
        torch.mul(gate_weights, (gate_weights[:, None, :] * differences).sum(2), out=d_gate)
