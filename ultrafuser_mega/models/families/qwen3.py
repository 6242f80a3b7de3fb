"""Qwen3 (dense): a norm on every head's queries and keys, heads of their own size, no bias."""

from __future__ import annotations

from ultrafuser_mega.models.families.family import Family
from ultrafuser_mega.models.families.qwen2 import QWEN_FIELDS
from ultrafuser_mega.models.families.rules import COMMON_LAYER, Norm

_Q_NORM, _K_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"

QWEN3 = Family(
    model_type="qwen3",
    rules=(
        *COMMON_LAYER,
        Norm(_Q_NORM, "self_attn.q_norm.weight", _Q_NORM, size="head_dim"),
        Norm(_K_NORM, "self_attn.k_norm.weight", _K_NORM, size="head_dim"),
    ),
    accepts={**QWEN_FIELDS, "attention_bias": (False,)},
    qk_norm=True,
)
