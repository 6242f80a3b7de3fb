"""``evaluation``: the held-out losses."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from ultrafuser_mega.config.section import Section


class Evaluation(Section):
    """Held-out evaluation, always at the end of each stage."""

    every: NonNegativeInt = Field(500, description="also every so many steps; 0: never")
    samples_per_class: PositiveInt = 100
    patience: PositiveInt | None = Field(
        None, description="end a stage behind so many evaluations in a row without a lower mean held-out loss"
    )
    token_views: NonNegativeInt = Field(2, description="samples per class in the token-coloured HTML")
