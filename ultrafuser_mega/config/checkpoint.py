"""``checkpoint``: when the run is saved."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from ultrafuser_mega.config.section import Section


class Checkpoint(Section):
    """Sharded checkpoints, always at the end of each stage; never of ruined weights (see training/divergence.py)."""

    every: NonNegativeInt = Field(500, description="also every so many steps; 0: never")
    keep: PositiveInt = Field(2, description="newest checkpoints to keep")
    stop_after_minutes: NonNegativeFloat | None = Field(
        None,
        description="end with a checkpoint, for --resume; a scheduler's limit less an evaluation, a step and a save",
    )
