"""Fused, gated, vocab-parallel linear cross-entropy, usable without the rest of the project.

    from ultrafuser_mega.ops import mixture_cross_entropy

Imports neither Megatron nor any other folder of the package. Triton is loaded when a CUDA tensor first comes in.
"""

from ultrafuser_mega.ops.distillation import DistillationLoss, distillation_loss
from ultrafuser_mega.ops.evaluation import cross_entropy_of_each
from ultrafuser_mega.ops.loss import (
    LossWithRows,
    mixture_cross_entropy,
    mixture_cross_entropy_with_rows,
)
from ultrafuser_mega.ops.workspace import Workspace

__all__ = [
    "DistillationLoss",
    "LossWithRows",
    "Workspace",
    "cross_entropy_of_each",
    "distillation_loss",
    "mixture_cross_entropy",
    "mixture_cross_entropy_with_rows",
]
