"""Weight gradients that are added to ``main_grad`` by what computes them, and the products of linear layers on CPUs.

Where ``gradient_accumulation_fusion`` is set Megatron-core asks apex's extension ``fused_weight_gradient_mlp_cuda`` for
that product, by a name in the module of its linear layers; else it rounds the gradient to the weight's type, writes it
and reads it again to add it. Where the extension is missing, and on CPUs, the product of ``ops/gemm.py`` answers.

On CPUs the same goes for embeddings, whose gradients else are tables of zeros with a few rows in them, and for the
output heads (:func:`adding_in_place`). On CUDA the rows would be added in no fixed order, and the loss of several
chunks would hold the heads' gradients in float32 (docs/decisions.md). What linear layers give out is a product of
``ops/gemm.py`` on CPUs, too; their inputs' gradients Megatron-core takes by a tensor's own method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops import gemm


@contextlib.contextmanager
def accumulated_weight_gradients(device: torch.device) -> Iterator[None]:
    """Around building layers on ``device``, their forward and their backward: the product is there, apex's on CUDA if
    installed, and on CPUs the embedding and the layers' outputs."""
    if device.type == "cuda" and layers._grad_accum_fusion_available:
        yield
        return
    ours: dict[str, Any] = {
        "_grad_accum_fusion_available": True,
        "fused_weight_gradient_mlp_cuda": SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate),
    }
    if device.type == "cpu":
        ours["torch"] = SimpleNamespace(**{**vars(torch), "matmul": gemm.product})
        ours["F"] = SimpleNamespace(**{**vars(F), "embedding": _embedding})
    saved = {name: getattr(layers, name, None) for name in ours}
    try:
        for name, value in ours.items():
            setattr(layers, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(layers, name, value)


def _accumulate(inputs: Tensor, upstream: Tensor, main_grad: Tensor) -> None:
    """main_grad (out, in) float32 += upstream^T inputs, of inputs (T, in) and upstream (T, out)."""
    gemm.accumulate(main_grad, upstream.t(), inputs, add=True)


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    """F.embedding."""
    if torch.is_grad_enabled() and table.requires_grad and hasattr(table, "main_grad"):
        out: Tensor = _AccumulatedEmbedding.apply(ids, table)
        return out
    return F.embedding(ids, table)


class _AccumulatedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Any) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(ids)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        rows = upstream.flatten(0, -2).to(ctx.table.main_grad.dtype)
        ctx.table.main_grad.index_add_(0, ids.flatten(), rows)
        return None, _added(ctx.table)


def adding_in_place(weights: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor | None] | None]:
    """The weights of a function that adds their gradients itself, and what it shall add them to; None: it shall not.

    Hooks on the weights run in the backward as if gradients had come.
    """
    into = [getattr(weight, "main_grad", None) if weight.requires_grad else None for weight in weights]
    if not torch.is_grad_enabled() or weights[0].device.type != "cpu" or all(buffer is None for buffer in into):
        return list(weights), None
    return [w if buffer is None else _AddedInPlace.apply(w) for w, buffer in zip(weights, into, strict=True)], into


class _AddedInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: None) -> Tensor:
        assert gradient is None
        return _added(ctx.weight)


def _added(weight: Any) -> Tensor:
    """In place of a gradient that ``main_grad`` has already: with this mark Megatron's hook drops it unread."""
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
