"""``evaluation``: the held-out losses."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from ultrafuser_mega.config.section import Section


class Evaluation(Section):
    """Held-out evaluation, always at the end of each stage."""

    every: NonNegativeInt = Field(500, description="also every so many steps; 0: never")
    samples_per_class: PositiveInt = 100
    token_views: NonNegativeInt = Field(2, description="samples per class in the token-coloured HTML")
