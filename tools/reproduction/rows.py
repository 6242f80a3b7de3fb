"""Names of the tables' rows."""

from __future__ import annotations

ULTRAFUSER = "UltraFuser"
AVERAGE, TASK_ARITHMETIC, BTX, FUSECHAT, LLAMAFUSER = "average", "task arithmetic", "BTX", "FuseChat", "LlamaFuser"
DIRECT_SAMPLES, DIRECT_STEPS = "direct, equal samples", "direct, equal stage-2 steps"
DIRECT_SAMPLES_GATE = "direct, equal samples, gate at stage 1's rate"
DIRECT_STEPS_GATE = "direct, equal stage-2 steps, gate at stage 1's rate"
IID, SKEWED, TOKENS = "iid", "skewed 10:1:1", "tokens balanced"
AFTER_STAGE_1 = "UltraFuser after stage 1"


def further_tuned(name: str) -> str:
    """Row of a specialist that was trained on, on all data."""
    return f"{name} + FT"


def on_own_class(name: str) -> str:
    """Row of a specialist that was trained on, on its class."""
    return f"{name} + FT on {name}"
