"""Weight gradients of linear layers that are added to ``main_grad`` by the product that computes them.

Where ``gradient_accumulation_fusion`` is set Megatron-core asks apex's extension ``fused_weight_gradient_mlp_cuda`` for
that product, by a name in the module of its linear layers; else it rounds the gradient to the weight's type, writes it
and reads it again to add it. Where the extension is missing, and on CPUs, the product of ``ops/gemm.py`` answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from ultrafuser_mega.ops import gemm


@contextlib.contextmanager
def accumulated_weight_gradients(device: torch.device) -> Iterator[None]:
    """Around building layers on ``device`` and their backward: the product is there, apex's on CUDA if installed."""
    if device.type == "cuda" and layers._grad_accum_fusion_available:
        yield
        return
    names = ("_grad_accum_fusion_available", "fused_weight_gradient_mlp_cuda")
    saved = [getattr(layers, name, None) for name in names]
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate)
    try:
        yield
    finally:
        for name, value in zip(names, saved, strict=True):
            setattr(layers, name, value)


def _accumulate(inputs: Tensor, upstream: Tensor, main_grad: Tensor) -> None:
    """main_grad (out, in) float32 += upstream^T inputs, of inputs (T, in) and upstream (T, out)."""
    gemm.accumulate(main_grad, upstream.t(), inputs, add=True)
