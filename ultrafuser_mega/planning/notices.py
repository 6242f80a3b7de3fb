"""What a run does to its specialists' weights that its user may not expect, in a line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ultrafuser_mega.checkpoint.checkpoint import Progress
from ultrafuser_mega.checkpoint.sources import element_types, held_types, read_sources, rounding
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.models.hf_folder import Architecture


def weight_notices(
    config: FuserConfig,
    architectures: Mapping[str, Architecture],
    dtype: torch.dtype,
    start: tuple[Progress, Path] | None,
) -> tuple[str, ...]:
    """Lines for people: which specialists are rounded to ``dtype`` on loading, which heads training unties.

    Raises:
        InputError: the weights, in the specialists' folders or in the checkpoint ``start``, cannot be read.
    """
    kept = read_sources(start[1]) if start else {}
    lines = []
    for name, arch in architectures.items():
        types = (
            held_types(start[1], kept[name], trained=start[0].trained) if start else element_types(config.folders[name])
        )
        if lost := rounding(types, dtype):
            lines.append(f"specialists.{name}: {lost} (dtype: {config.dtype}); dtype=fp32 keeps them as they are")
        if arch.tied and config.stage2.steps:
            lines.append(
                f"specialists.{name}: its folder ties the output head to the embedding; stage 2 trains them apart, "
                "so its export holds both (tie_word_embeddings: false)"
            )
    return tuple(lines)
