"""Mistral 7B and its kin: Llama's layer with attention to a sliding window.

The window is not computed here. Where it is at least as long as the sequences it changes nothing; longer sequences
are refused by name (``check_positions``).
"""

from __future__ import annotations

from ultrafuser_mega.models.families.family import Family
from ultrafuser_mega.models.families.rules import COMMON_LAYER

MISTRAL = Family(
    model_type="mistral",
    rules=COMMON_LAYER,
    accepts={"sliding_window": ()},
)
