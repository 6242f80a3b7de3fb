"""``lora``: the adapters of every specialist that a stage trains by them."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ultrafuser_mega.config.section import Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(Section):
    """Low-rank adapters beside linear maps: y = W x + s B A x (Hu et al. 2021), in PEFT's words."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = Field(32.0, description="s = alpha / rank, with rslora alpha / sqrt(rank)")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of an adapter's inputs that training leaves out")
    rslora: bool = Field(False, description="s does not fall with the rank so fast (Kalajdzievski 2023)")
    targets: tuple[Target, ...] = Field(TARGETS, min_length=1, description="projections of every layer that have one")

    @field_validator("targets", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _as_a_layer_has_them(cls, value: tuple[Target, ...]) -> tuple[Target, ...]:
        return tuple(target for target in TARGETS if target in value)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
