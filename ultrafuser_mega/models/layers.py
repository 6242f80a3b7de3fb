"""Megatron-core's decoder layer with the norm and the attention core that it lacks off CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ultrafuser_mega.models.attention import PackedAttention


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight is marked for sequence parallelism.

    Under sequence parallelism each tensor-parallel rank norms its own part of the sequence, so the weight's
    gradients must be summed over them; Megatron does that for weights with this mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., d)
        # Llama's definition: normalise in float32, round, then scale.
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


def layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """Megatron-core's local decoder layer with this project's norm and attention core.

    Args:
        qk_norm: also norm every head's queries and keys.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    if qk_norm:
        spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return spec
