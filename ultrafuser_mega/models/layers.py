"""The two layers that Megatron-core's local spec lacks off CUDA: a norm and an attention core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ultrafuser_mega.models.families import LinearScaling, Llama3Scaling


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


class SdpaCoreAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, with grouped queries."""

    def __init__(self, config: TransformerConfig, *args: object, **unused: object) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None = None, **unused: object) -> Tensor:
        """q (s, b, heads, e), k and v (s, b, groups, e) -> (s, b, heads * e)."""
        s, b, heads, e = q.shape
        grouped = k.shape[2] != heads
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * e)


def scaled_frequencies(inv_freq: Tensor, scaling: LinearScaling | Llama3Scaling) -> Tensor:  # (e / 2,) -> (e / 2,)
    """Rotary frequencies stretched by ``factor``: all of them, or as in Llama 3 the slow ones, and others in part."""
    if isinstance(scaling, LinearScaling):
        return inv_freq / scaling.factor
    turns = scaling.original_max_positions * inv_freq / (2 * math.pi)  # in the original context
    share = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - share) * inv_freq / scaling.factor + share * inv_freq


def layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """Megatron-core's local decoder layer with the two layers above in place.

    Args:
        qk_norm: also norm every head's queries and keys.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    if qk_norm:
        spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return spec
