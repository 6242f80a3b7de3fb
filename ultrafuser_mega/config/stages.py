"""``stage1``, ``stage2`` and ``optimizer``: how the weights move."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ultrafuser_mega.config.section import Section
from ultrafuser_mega.errors import InputError

Mode = Literal["frozen", "lora", "full"]


class Part(Section):
    """How a stage trains a part of the model; what is left out is as the stage has it (see ``parts``)."""

    mode: Mode | None = Field(None, description="frozen, lora (a specialist's adapters alone) or full")
    lr: PositiveFloat | None = Field(None, description="its highest rate; its min_lr then is in the same proportion")
    min_lr: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    schedule: Literal["cosine", "constant"] | None = None
    weight_decay: NonNegativeFloat | None = Field(None, description="default: optimizer.weight_decay")


class Stage(Section):
    """One of the two training stages (paper, algorithm 1)."""

    steps: NonNegativeInt = Field(description="at most; 0 leaves the stage out")
    epochs: PositiveFloat | None = Field(
        None, description="end before, once as many samples were taken as so many times all training rows"
    )
    samples_per_class: PositiveInt = Field(description="n: samples of each class in every global batch")
    lr: PositiveFloat = Field(description="the highest rate: of the warm-up's last step, without a warm-up the first's")
    min_lr: NonNegativeFloat = Field(0.0, description="where the cosine would be one step after the last")
    warmup_steps: NonNegativeInt = Field(0, description="n: steps k = 1 .. n have the rate lr k / n")
    schedule: Literal["cosine", "constant"] = "cosine"
    train: dict[str, Part] = Field(
        default_factory=dict,
        description="gate, heads, a specialist's name, or specialists for all that are not named -> frozen, lora, "
        "full, or {mode: lora, lr: 1e-4, ..}; default: stage 1 trains the gate, stage 2 everything in full",
    )

    @field_validator("train", mode="before")
    @classmethod
    def _mode_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"mode": part} if isinstance(part, str) else part for name, part in value.items()}

    def check_schedule(self, name: str) -> None:
        """Refuse a schedule that cannot be followed; no concern of one who reads what a run was, so not of validation.

        Args:
            name: of the stage, for the message.

        Raises:
            InputError: the rate would climb where it should fall, never reach ``lr``, or leave a setting unread.
        """
        if self.min_lr > self.lr:
            raise InputError(f"{name}.min_lr: {self.min_lr:g} is more than {name}.lr, {self.lr:g}; make it smaller")
        if self.warmup_steps > self.steps:
            raise InputError(
                f"{name}.warmup_steps: {self.warmup_steps} is more than the stage's {self.steps} steps, which would "
                f"never reach {name}.lr; set {name}.warmup_steps to {self.steps} or less"
            )
        if self.schedule == "constant" and self.min_lr:
            raise InputError(
                f"{name}.min_lr: {self.min_lr:g} is never reached with {name}.schedule constant; "
                f"leave it out, or set {name}.schedule=cosine"
            )


class Stage2(Stage):
    """Everything together; the gate, which begins far from where it ends, may have a rate of its own."""

    gate_lr: PositiveFloat | None = Field(
        None, description="the gate's highest rate, and its min_lr is in the same proportion; default: lr"
    )


class Optimizer(Section):
    """AdamW."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(0.0, description="of matrices, embeddings among them; not biases and norms")
    clip_grad: NonNegativeFloat = Field(1.0, description="bound on the global gradient norm; 0: none")
    state: Literal["device", "host"] = Field(
        "device",
        description="where moments and float32 weights lie between updates (8 or 12 bytes a trained parameter); from "
        "the host's memory they come to the GPU for the update, which changes no result",
    )
