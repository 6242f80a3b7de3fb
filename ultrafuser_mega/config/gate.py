"""``gate``: the gating network."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from ultrafuser_mega.config.section import Section


class GateOptions(Section):
    """The gating MLP (paper, appendix C)."""

    hidden_size: PositiveInt | None = Field(
        None, description="hidden units; default: the largest specialist's hidden size"
    )
