"""``stage1``, ``stage2`` and ``optimizer``: how the weights move."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ultrafuser_mega.config.section import Section


class Stage(Section):
    """One of the two training stages (paper, algorithm 1)."""

    steps: NonNegativeInt
    samples_per_class: PositiveInt = Field(description="n: samples of each class in every global batch")
    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["cosine", "constant"] = "cosine"


class Optimizer(Section):
    """AdamW."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = Field(1.0, description="bound on the global gradient norm; 0: none")
