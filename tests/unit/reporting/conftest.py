"""A small invented run: three classes, three specialists, two stages."""

from __future__ import annotations

from typing import Any

import pytest

from ultrafuser_mega.reporting.records import EvalRecord, StepRecord

CLASSES = ("text", "code", "math")
# The paper's table 6.
GATE = {
    "text": {"text": 0.45, "code": 0.29, "math": 0.26},
    "code": {"text": 0.23, "code": 0.59, "math": 0.18},
    "math": {"text": 0.18, "code": 0.39, "math": 0.43},
}
LOSS = {
    "text": {"fused": 2.74, "text": 2.90, "code": 5.20, "math": 6.60},
    "code": {"fused": 2.24, "text": 4.10, "code": 2.30, "math": 6.90},
    "math": {"fused": 2.79, "text": 5.90, "code": 6.10, "math": 2.95},
}
YARDSTICKS = {
    "text": {"uniform logits": 3.90, "oracle per class": 2.90, "oracle per token": 2.50},
    "code": {"uniform logits": 3.40, "oracle per class": 2.30, "oracle per token": 2.10},
    "math": {"uniform logits": 3.60, "oracle per class": 2.95, "oracle per token": 2.30},
}


def make_step(step: int, *, stage: int = 1, **changes: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "stage": stage,
        "step": step,
        "loss": 3.0 - 0.01 * step,
        "class_loss": {name: 3.0 - 0.01 * step + 0.1 * index for index, name in enumerate(CLASSES)},
        "lr": 2e-3,
        "grad_norm": 0.5,
        "tokens": 1400,
        "tokens_per_s": 12345.0,
        "gate": GATE,
        "seconds": 0.25,
    }
    return StepRecord(**(fields | changes))


@pytest.fixture
def steps() -> list[StepRecord]:
    return [make_step(step, stage=1 if step <= 8 else 2) for step in range(1, 13)]


@pytest.fixture
def after_stage1() -> EvalRecord:
    return EvalRecord(
        stage=1, step=8, loss={"text": {"fused": 2.80}, "code": {"fused": 2.20}, "math": {"fused": 2.85}}, gate=GATE
    )


@pytest.fixture
def final() -> EvalRecord:
    return EvalRecord(stage=2, step=12, loss=LOSS, gate=GATE)


@pytest.fixture
def with_yardsticks() -> EvalRecord:
    return EvalRecord(stage=1, step=8, loss=LOSS, gate=GATE, yardsticks=YARDSTICKS)


@pytest.fixture
def step_of() -> Any:
    """``step_of(7, loss=...)``: the invented step 7 with some fields changed."""
    return make_step
