"""The softmax work between the GEMMs of the chunked backend, in three interchangeable forms.

An epilogue reads a chunk of fused logits and later turns the same memory into their gradient:

    statistics(logits (C, R), target (C,), keep)  ->  ((C, 4) row statistics, scratch)
    dlogits(logits, scratch, target, row_max (C,), (a, b, c) each (C,))  ->  (C, R) gradient, in the logits' memory
    mixture_statistics(logits (n, C, R), gate_weights (C, n), target (C,))  ->  (C, 4 + 3 n), the gate's gradient in it
    mixture_dlogits(logits, gate_weights, target, row_max, (a, b, c))  ->  (n, C, R): w_j dz, in the logits' memory

``operand_dtype`` is the type of that gradient and of the other operand of its GEMMs; ``target`` is the local column or
-1. With keep=False the chunk is only looked at. Between the two calls the buffer's contents belong to the epilogue (the
CPU's holds scaled exponentials there). A mixture's z has the same bits in both of its calls. See statistics.py for the
algebra.

epilogue_torch.py is the twin the compiled ones, epilogue_cpu.py and epilogue_triton.py, are tested against.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ultrafuser_mega.ops.epilogue_cpu import CpuEpilogue
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue
from ultrafuser_mega.ops.problem import accumulate_dtype

Coefficients = tuple[Tensor, Tensor, Tensor]  # a, b, c: each (C,)


class Epilogue(Protocol):
    operand_dtype: torch.dtype

    def statistics(self, logits: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, Any]: ...

    def dlogits(
        self, logits: Tensor, scratch: Any, target: Tensor, row_max: Tensor, coefficients: Coefficients
    ) -> Tensor: ...

    def mixture_statistics(self, logits: Tensor, gate_weights: Tensor, target: Tensor) -> Tensor: ...

    def mixture_dlogits(
        self, logits: Tensor, gate_weights: Tensor, target: Tensor, row_max: Tensor, coefficients: Coefficients
    ) -> Tensor: ...


def epilogue_for(device: torch.device, dtype: torch.dtype) -> Epilogue:
    """The epilogue that serves ``device`` for hidden states and heads of type ``dtype``."""
    if device.type == "cpu":
        return CpuEpilogue(accumulate_dtype(dtype))  # 16-bit operands are upcast there anyway, see gemm.py
    if device.type == "cuda" and dtype != torch.float64:
        from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue  # the one place that needs triton

        return TritonEpilogue(dtype)
    return TorchEpilogue(accumulate_dtype(dtype))
