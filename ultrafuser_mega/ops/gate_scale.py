"""What the gate does around the GEMMs, forward and backward, and the one place that chooses who computes it.

    scale_inputs         w = softmax(a_1 .. a_n) and x_j = w_j h_j, the GEMMs' inputs
    unscale_gradients    from dx_j:  dw_j = <h_j, dx_j>,  dh_j = w_j dx_j,  da_j = w_j sum_k w_k (dw_j - dw_k)

The last is w_j (dw_j - sum_k w_k dw_k), but what all dw have in common cancels in it before anything is rounded, and so
does a specialist's own dw where the gate has settled on it, w_j = 1: its da is as exact as that of the others.

An ignored row gives x = 0, equal weights and da = 0, whatever it holds; its dx_j must be 0. Columns of d_inputs and of
the outputs are contiguous.

gate_scale_torch.py is the definition and serves every device; gate_scale_cuda.py (csrc/gate_kernels.cu) reads and
writes every number once, where it was built and a GPU can run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ultrafuser_mega.ops import gate_scale_cuda, gate_scale_torch


class GateScale(Protocol):
    def scale_inputs(
        self, gate_logits: Tensor, kept: Tensor, hidden: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]: ...

    def unscale_gradients(
        self,
        gate_weights: Tensor,
        kept: Tensor,
        hidden: Sequence[Tensor],
        d_inputs: Sequence[Tensor | None],
        d_hidden: Sequence[Tensor | None],
        d_gate: Tensor | None,
    ) -> None: ...


def scale_inputs(
    gate_logits: Tensor,  # (C, n) fp32, or fp64 beside fp64 hidden
    kept: Tensor,  # (C,) bool
    hidden: Sequence[Tensor],  # n x (C, d_j)
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """(w (C, n) in the type of ``gate_logits``, x: n x (C, d_j) in ``dtype``, formed wide and rounded once)."""
    return _chosen(hidden, dtype).scale_inputs(gate_logits, kept, hidden, dtype)


def unscale_gradients(
    gate_weights: Tensor,  # (C, n) fp32, or fp64
    kept: Tensor,  # (C,) bool
    hidden: Sequence[Tensor],  # n x (C, d_j)
    d_inputs: Sequence[Tensor | None],  # n x (C, d_j) in the type of gate_weights; all given if d_gate is
    d_hidden: Sequence[Tensor | None],  # n x (C, d_j) out, all in the type of hidden or all in that of gate_weights
    d_gate: Tensor | None,  # (C, n) out, in the type of gate_weights
) -> None:
    """Writes dh_j and da where they are wanted, that is, where there is a tensor to write to."""
    chosen = _chosen(hidden, hidden[0].dtype)
    chosen.unscale_gradients(gate_weights, kept, hidden, d_inputs, d_hidden, d_gate)


def _chosen(hidden: Sequence[Tensor], dtype: torch.dtype) -> GateScale:
    """The kernels where they can serve, plain PyTorch elsewhere. dtype: of the GEMMs' operands."""
    first = hidden[0]
    if dtype == first.dtype and gate_scale_cuda.serves(first.device, first.dtype, len(hidden)):
        return gate_scale_cuda
    return gate_scale_torch
