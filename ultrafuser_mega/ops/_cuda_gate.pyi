"""Types of the CUDA module built from csrc/gate_kernels_module.cpp. Tensors and streams cross as addresses."""

from collections.abc import Sequence
from enum import Enum

MAX_SPECIALISTS: int

class Type(Enum):
    f32 = ...
    f16 = ...
    bf16 = ...

def scale_inputs(
    type: Type,
    gate_logits: int,
    kept: int,
    gate_weights: int,
    rows: int,
    segments: Sequence[tuple[int, int, int, int, int]],  # hidden, stride, inputs, stride, width
    device: int,
    stream: int,
) -> None: ...
def unscale_gradients(
    type: Type,
    d_hidden_type: Type,
    gate_weights: int,
    kept: int,
    d_gate: int,
    rows: int,
    segments: Sequence[tuple[int, int, int, int, int, int, int]],  # hidden, d_inputs, d_hidden, each with stride; width
    device: int,
    stream: int,
) -> None: ...
def why_unusable(device: int) -> str: ...
