"""``distil``: one of the specialists is a student, and learns from the others fused; see docs/distillation.md."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ultrafuser_mega.config.section import Section

Kind = Literal["own", "prompts", "on_policy"]
KINDS: tuple[Kind, ...] = ("own", "prompts", "on_policy")


class Shares(Section):
    """Which steps take which data: of many steps each kind has a part in proportion to its share."""

    own: NonNegativeFloat = Field(1.0, description="the run's own prompts and responses")
    prompts: NonNegativeFloat = Field(0.0, description="its prompts, answered by the teacher before training")
    on_policy: NonNegativeFloat = Field(0.0, description="its prompts, answered by the student as it is then")


class Distil(Section):
    """The student's loss (1 - labels) T^2 ((1 - reverse) KL(p | q) + reverse KL(q | p)) + labels CE; see ops."""

    student: str = Field(description="the specialist that learns; gate and teacher are of the others")
    teacher: Path = Field(description="checkpoint of the fused model that teaches, or its run")
    temperature: PositiveFloat = Field(1.0, description="T, of teacher and student")
    reverse: float = Field(0.0, ge=0.0, le=1.0, description="share of KL(q | p); on-policy steps take it alone")
    labels: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the responses' cross-entropy; the student's own answers are none"
    )
    data: Shares = Shares()
    on_policy_after: NonNegativeInt = Field(
        0, description="steps before the first on-policy one; behind them those catch up with their share"
    )
    refresh: PositiveInt = Field(50, description="on-policy steps between two times that the student answers")
    max_new_tokens: PositiveInt = Field(256, description="of an answer")
    sampling_temperature: NonNegativeFloat = Field(1.0, description="of answers; 0: the likeliest tokens")

    @model_validator(mode="after")
    def _some_data(self) -> Distil:
        if not any(getattr(self.data, kind) for kind in KINDS):
            raise ValueError("data has no share above 0; give own, prompts or on_policy one")
        if self.on_policy_after and not self.data.on_policy:
            raise ValueError("on_policy_after: data.on_policy is 0; give it a share, or leave on_policy_after out")
        if self.on_policy_after and not (self.data.own or self.data.prompts):
            raise ValueError(
                f"on_policy_after: nothing is there to learn in the first {self.on_policy_after} steps; give data.own "
                "or data.prompts a share"
            )
        return self

    def kinds(self, steps: int) -> list[Kind]:
        """What each of so many steps takes: the kind that is furthest behind its share, the first of equals.

        On-policy steps wait until ``on_policy_after`` others are done. Fewer steps take the same as the first of more.
        """
        shares: dict[Kind, float] = {kind: getattr(self.data, kind) for kind in KINDS if getattr(self.data, kind)}
        total, taken, order = sum(shares.values()), dict.fromkeys(shares, 0), list[Kind]()
        for done in range(1, steps + 1):
            ready = [kind for kind in shares if kind != "on_policy" or done > self.on_policy_after]
            chosen = max(ready, key=lambda kind: done * shares[kind] / total - taken[kind])
            taken[chosen] += 1
            order.append(chosen)
        return order
