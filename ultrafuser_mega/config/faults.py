"""``faults``: what a run does about faults that it can go on from."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveInt

from ultrafuser_mega.config.section import Section


class Faults(Section):
    """Steps without a number, ranks without an answer."""

    skips: PositiveInt = Field(
        3,
        description="a step whose loss or gradient is not finite is skipped; behind so many in a row the run goes back "
        "to its newest checkpoint",
    )
    hang_minutes: NonNegativeFloat = Field(
        10.0,
        description="no phase of a step (a microbatch's forward, an exchange, a save, a step of the engine that "
        "answers) takes so long: a rank hangs, and the job ends; 0: never",
    )
