"""The chunked backend's epilogue on the CPU: csrc/cpu_epilogue.cpp behind the interface of epilogue.py.

Two sweeps over the chunk with one exponential per logit, on torch.get_num_threads() threads; fp32 and fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.ops.operators import launch_operator

try:
    from ultrafuser_mega.ops import _cpu_epilogue
except ImportError as error:
    raise ImportError(
        "ultrafuser_mega.ops: its C++ extension is not built;"
        " run `pip install .`, or `python setup.py build_ext --inplace` in a checkout"
        f" ({error})"
    ) from None

STATISTICS = {torch.float32: _cpu_epilogue.row_statistics_f32, torch.float64: _cpu_epilogue.row_statistics_f64}
MIXTURE = {torch.float32: _cpu_epilogue.mixture_statistics_f32, torch.float64: _cpu_epilogue.mixture_statistics_f64}
MIXTURE_DLOGITS = {torch.float32: _cpu_epilogue.mixture_dlogits_f32, torch.float64: _cpu_epilogue.mixture_dlogits_f64}
DLOGITS = {torch.float32: _cpu_epilogue.dlogits_f32, torch.float64: _cpu_epilogue.dlogits_f64}


@launch_operator("cpu_row_statistics(Tensor logits, Tensor target, Tensor(a!) statistics, Tensor(b!)? block_max)")
def _row_statistics(logits: Tensor, target: Tensor, statistics: Tensor, block_max: Tensor | None) -> None:
    rows, columns = logits.shape
    STATISTICS[logits.dtype](
        logits.data_ptr(),
        target.data_ptr(),
        rows,
        columns,
        logits.stride(0),
        statistics.data_ptr(),
        0 if block_max is None else block_max.data_ptr(),
        torch.get_num_threads(),
    )


@launch_operator(
    "cpu_dlogits(Tensor(a!) logits, Tensor target, Tensor block_max, Tensor row_max, Tensor a, Tensor b, Tensor c)"
)
def _dlogits(
    logits: Tensor, target: Tensor, block_max: Tensor, row_max: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> None:
    rows, columns = logits.shape
    DLOGITS[logits.dtype](
        logits.data_ptr(),
        target.data_ptr(),
        rows,
        columns,
        logits.stride(0),
        block_max.data_ptr(),
        row_max.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        torch.get_num_threads(),
    )


@launch_operator("cpu_mixture_statistics(Tensor logits, Tensor gate_weights, Tensor target, Tensor(a!) statistics)")
def _mixture_statistics(logits: Tensor, gate_weights: Tensor, target: Tensor, statistics: Tensor) -> None:
    specialists, rows, columns = logits.shape
    MIXTURE[logits.dtype](
        logits.data_ptr(),
        target.data_ptr(),
        rows,
        columns,
        logits.stride(1),
        logits.stride(0),
        specialists,
        gate_weights.data_ptr(),
        statistics.data_ptr(),
        torch.get_num_threads(),
    )


@launch_operator(
    "cpu_mixture_dlogits(Tensor(a!) logits, Tensor gate_weights, Tensor target, Tensor row_max,"
    " Tensor a, Tensor b, Tensor c)"
)
def _mixture_dlogits(
    logits: Tensor, gate_weights: Tensor, target: Tensor, row_max: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> None:
    specialists, rows, columns = logits.shape
    MIXTURE_DLOGITS[logits.dtype](
        logits.data_ptr(),
        target.data_ptr(),
        rows,
        columns,
        logits.stride(1),
        logits.stride(0),
        specialists,
        gate_weights.data_ptr(),
        row_max.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        torch.get_num_threads(),
    )


class CpuEpilogue:
    """fp32 or fp64 logits; their gradient has the same type."""

    def __init__(self, operand_dtype: torch.dtype) -> None:
        self.operand_dtype = operand_dtype

    def statistics(self, logits: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        rows, columns = logits.shape
        out = logits.new_empty((rows, 4))
        blocks = -(-columns // _cpu_epilogue.BLOCK_COLUMNS)
        block_max = logits.new_empty((rows, max(1, blocks))) if keep else None
        _row_statistics(logits, target.contiguous(), out, block_max)
        return out, block_max

    def dlogits(
        self,
        logits: Tensor,
        scratch: Tensor,
        target: Tensor,
        row_max: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        target, row_max, a, b, c = (tensor.contiguous() for tensor in (target, row_max, *coefficients))
        _dlogits(logits, target, scratch, row_max, a, b, c)
        return logits

    def mixture_statistics(self, logits: Tensor, gate_weights: Tensor, target: Tensor) -> Tensor:
        specialists, rows, _ = logits.shape
        out = logits.new_empty((rows, 4 + 3 * specialists))
        _mixture_statistics(logits, gate_weights.contiguous(), target.contiguous(), out)
        return out

    def mixture_dlogits(
        self,
        logits: Tensor,
        gate_weights: Tensor,
        target: Tensor,
        row_max: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        _mixture_dlogits(logits, *(t.contiguous() for t in (gate_weights, target, row_max, *coefficients)))
        return logits
