"""``checkpoint``: when the run is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from ultrafuser_mega.config.section import Section


class Checkpoint(Section):
    """Sharded checkpoints, always at the end of each stage; never of ruined weights (see training/divergence.py)."""

    every: NonNegativeInt = Field(500, description="also every so many steps; 0: never")
    weights: Literal["all", "trained"] = Field(
        "all",
        description="trained: adapters, gate and what trains in full, a small part of the whole; the other weights are "
        "read from the specialists' folders then, which must stay",
    )
    keep: PositiveInt = Field(2, description="newest checkpoints to keep")
    keep_best: bool = Field(
        False,
        description="also write one at every evaluation whose mean held-out loss is the lowest of the stage; it stays, "
        "and checkpoints/best points to it",
    )
    keep_every: NonNegativeInt = Field(
        0, description="those whose step of the stage is a multiple of it stay too; 0: none"
    )
    start: Path | None = Field(
        None,
        description="begin with the weights of this checkpoint (an imported release, another run) instead of those in "
        "the specialists' folders; nothing of its optimizer or its steps",
    )
    stop_after_minutes: NonNegativeFloat | None = Field(
        None,
        description="end with a checkpoint, for --resume; a scheduler's limit less an evaluation, a step and a save",
    )
