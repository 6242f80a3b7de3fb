"""``loss``: what is minimised, and by which kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from ultrafuser_mega.config.section import Section


class Loss(Section):
    """The training loss (paper, eq. 2)."""

    normalize: Literal["token", "sample"] = Field(
        "token", description="token: mean over the global batch's response tokens; sample: the paper's sum per sample"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    z_loss: NonNegativeFloat = 0.0
    backend: Literal["auto", "reference", "chunked", "streaming", "gate_only"] = "auto"
