"""Llama 1, 2 and 3, and what was trained from them: CodeLlama, WizardMath, UltraLM, Vicuna."""

from __future__ import annotations

from ultrafuser_mega.models.families.family import Family
from ultrafuser_mega.models.families.rules import COMMON_LAYER

LLAMA = Family(
    model_type="llama",
    rules=COMMON_LAYER,
    accepts={"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": ()},
)
