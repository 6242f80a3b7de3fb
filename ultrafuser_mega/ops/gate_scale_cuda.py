"""gate_scale.py on a GPU: csrc/gate_kernels.cu, one kernel forward and one backward, on the current stream.

The extension is optional (UFM_BUILD_CUDA, see setup.py) and may have been built for newer drivers or other GPUs than
this machine's; serves() says whether it can be used, and warns once where it was built for nothing.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.ops.operators import launch_operator

MODULE = "ultrafuser_mega.ops._cuda_gate"
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def serves(device: torch.device, dtype: torch.dtype, specialists: int) -> bool:
    """Whether the kernels can take that many specialists' hidden states of ``dtype`` on ``device``."""
    if device.type != "cuda" or dtype not in TYPES:
        return False
    kernels = _kernels(torch.cuda.current_device() if device.index is None else device.index)
    return kernels is not None and specialists <= kernels.MAX_SPECIALISTS


@functools.cache
def _kernels(device_index: int) -> Any:
    """The extension, or None where it was not built, cannot be loaded or cannot run on this GPU."""
    try:
        extension = importlib.import_module(MODULE)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"the gate's CUDA kernels cannot be loaded: {reason}; PyTorch's take over", stacklevel=2)
        return None
    if not torch.cuda.is_available():  # tensors on a GPU and no GPU: fake ones
        return None
    with torch.cuda.device(device_index):  # the kernels set the device; PyTorch's own guard sets it back
        reason = extension.why_unusable(device_index)
    if reason:
        name = torch.cuda.get_device_name(device_index)
        warnings.warn(f"the gate's CUDA kernels cannot run on {name}: {reason}; PyTorch's take over", stacklevel=2)
        return None
    return extension


def scale_inputs(
    gate_logits: Tensor,  # (C, n) fp32
    kept: Tensor,  # (C,)
    hidden: Sequence[Tensor],  # n x (C, d_j)
    dtype: torch.dtype,  # that of hidden
) -> tuple[Tensor, list[Tensor]]:
    gate_weights = torch.empty_like(gate_logits, memory_format=torch.contiguous_format)
    inputs = [torch.empty(states.shape, dtype=dtype, device=states.device) for states in hidden]
    rows = [_with_whole_rows(states) for states in hidden]
    _scale_inputs(gate_logits.contiguous(), kept.contiguous(), rows, gate_weights, inputs)
    return gate_weights, inputs


def unscale_gradients(
    gate_weights: Tensor,  # (C, n) fp32
    kept: Tensor,  # (C,)
    hidden: Sequence[Tensor],  # n x (C, d_j)
    d_inputs: Sequence[Tensor | None],  # n x (C, d_j) fp32, columns contiguous
    d_hidden: Sequence[Tensor | None],  # n x (C, d_j) out, columns contiguous
    d_gate: Tensor | None,  # (C, n) out, contiguous
) -> None:
    rows = [_with_whole_rows(states) for states in hidden]
    nothing = gate_weights.new_empty((0, 0))  # schemas know no list of tensors some of which are None and written to
    _unscale_gradients(
        gate_weights.contiguous(),
        kept.contiguous(),
        rows,
        [nothing if dx is None else dx for dx in d_inputs],
        [nothing if dh is None else dh for dh in d_hidden],
        nothing if d_gate is None else d_gate,
    )


@launch_operator(
    "gate_scale_inputs(Tensor gate_logits, Tensor kept, Tensor[] hidden, Tensor(a!) gate_weights, Tensor(b!)[] inputs)"
)
def _scale_inputs(
    gate_logits: Tensor, kept: Tensor, hidden: Sequence[Tensor], gate_weights: Tensor, inputs: Sequence[Tensor]
) -> None:
    kernels = _kernels(gate_logits.device.index)
    with torch.cuda.device(gate_logits.device):
        kernels.scale_inputs(
            getattr(kernels.Type, TYPES[inputs[0].dtype]),
            gate_logits.data_ptr(),
            kept.data_ptr(),
            gate_weights.data_ptr(),
            gate_logits.shape[0],
            [(*_rows_of(h), *_rows_of(x), h.shape[1]) for h, x in zip(hidden, inputs, strict=True)],
            gate_logits.device.index,
            torch.cuda.current_stream().cuda_stream,
        )


@launch_operator(
    "gate_unscale_gradients(Tensor gate_weights, Tensor kept, Tensor[] hidden, Tensor[] d_inputs,"
    " Tensor(a!)[] d_hidden, Tensor(b!) d_gate)"
)
def _unscale_gradients(
    gate_weights: Tensor,
    kept: Tensor,
    hidden: Sequence[Tensor],
    d_inputs: Sequence[Tensor],
    d_hidden: Sequence[Tensor],
    d_gate: Tensor,
) -> None:
    kernels = _kernels(gate_weights.device.index)
    written = next((out.dtype for out in d_hidden if out.numel()), hidden[0].dtype)
    with torch.cuda.device(gate_weights.device):
        kernels.unscale_gradients(
            getattr(kernels.Type, TYPES[hidden[0].dtype]),
            getattr(kernels.Type, TYPES[written]),
            gate_weights.data_ptr(),
            kept.data_ptr(),
            d_gate.data_ptr() if d_gate.numel() else 0,
            gate_weights.shape[0],
            [
                (*_rows_of(h), *_rows_of(dx), *_rows_of(dh), h.shape[1])
                for h, dx, dh in zip(hidden, d_inputs, d_hidden, strict=True)
            ],
            gate_weights.device.index,
            torch.cuda.current_stream().cuda_stream,
        )


def _with_whole_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _rows_of(matrix: Tensor) -> tuple[int, int]:
    """Address and row stride; (0, 0) for nothing."""
    return (matrix.data_ptr(), matrix.stride(0)) if matrix.numel() else (0, 0)
