"""The epilogue of epilogue.py in plain PyTorch: the twin that the compiled ones are tested against.

It also serves what they do not: fp64 on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.ops.statistics import MAX


class TorchEpilogue:
    """Plain PyTorch on any device; logits and gradients of one type."""

    def __init__(self, operand_dtype: torch.dtype) -> None:
        self.operand_dtype = operand_dtype

    def statistics(self, logits: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, None]:
        rows, columns = logits.shape
        if columns == 0:
            identity = logits.new_zeros((rows, 4))
            identity[:, 0::2] = float("-inf")
            return identity, None
        top = logits.amax(1)  # (C,)
        shifted = logits - top[:, None]
        column = target.clamp(min=0)[:, None]
        at_target = torch.where(target >= 0, shifted.gather(1, column).squeeze(1), float("-inf"))
        return torch.stack((top, shifted.exp().sum(1), at_target, shifted.sum(1)), dim=1), None

    def dlogits(
        self,
        logits: Tensor,
        scratch: None,
        target: Tensor,
        row_max: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        a, b, c = (coefficient[:, None] for coefficient in coefficients)
        dead = (a == 0) & (b == 0) & (c == 0)
        logits.sub_(row_max[:, None]).exp_().mul_(a).sub_(c)
        if logits.shape[1]:
            column = target.clamp(min=0)[:, None]
            logits.scatter_add_(1, column, torch.where(target[:, None] >= 0, -b, 0.0))  # one element per row: exact
        return logits.masked_fill_(dead, 0.0)

    def mixture_statistics(self, logits: Tensor, gate_weights: Tensor, target: Tensor) -> Tensor:
        mixed = (logits * gate_weights.t()[:, :, None]).sum(0)  # (C, R)
        statistics, _ = self.statistics(mixed, target, keep=True)
        deviation = logits - mixed  # (n, C, R)
        origin = statistics[:, MAX].masked_fill(statistics[:, MAX] == float("-inf"), 0.0)
        expectation = (deviation * (mixed - origin[:, None]).exp()).sum(2)  # (n, C)
        at_target = torch.zeros_like(expectation)
        if mixed.shape[1]:
            column = target.clamp(min=0).expand(logits.shape[0], -1)[:, :, None]
            at_target = torch.where(target >= 0, deviation.gather(2, column).squeeze(2), 0.0)
        return torch.cat((statistics, expectation.t(), at_target.t(), deviation.sum(2).t()), dim=1)

    def mixture_dlogits(
        self,
        logits: Tensor,
        gate_weights: Tensor,
        target: Tensor,
        row_max: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        weights = gate_weights.t()[:, :, None]  # (n, C, 1)
        dz = self.dlogits((logits * weights).sum(0), None, target, row_max, coefficients)
        return torch.mul(dz, weights, out=logits)
