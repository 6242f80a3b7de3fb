"""Megatron-core's decoder layer with this project's norm, activation and attention between its linear maps.

Hidden states are (T, d) where Megatron's own are (T, 1, d): its linear maps then call a product as it is, without views
of its operands and results around it.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ultrafuser_mega.models.attention import PackedSelfAttention
from ultrafuser_mega.models.elementwise import rms_norm, swiglu


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
        return rms_norm(x, self.weight, self.eps)


class SwiGlu:
    """The MLP's activation, as Megatron builds one that a spec names. No module: it has no state to checkpoint."""

    def __init__(self, config: TransformerConfig) -> None: ...

    def __call__(self, x: Tensor) -> Tensor:  # (T, 2 f) -> (T, f)
        return swiglu(x)


def layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """Megatron-core's local decoder layer with this project's norm, activation and attention.

    Args:
        qk_norm: also norm every head's queries and keys.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.mlp.submodules.activation_func = SwiGlu
    spec.submodules.self_attention.module = PackedSelfAttention
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = IdentityOp
    attention.q_layernorm = attention.k_layernorm = RMSNorm if qk_norm else None
    return spec
