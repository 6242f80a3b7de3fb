"""What a family is, and the sizes of one of its members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ultrafuser_mega.models.families.rules import LayerSizes, Rule


@dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies stretched alike (rope_type "linear")."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretching of the slow rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture(LayerSizes):
    """What a specialist's sharded model needs to know of its config.json (sizes in elements).

    Attributes:
        family: key of ``FAMILIES``.
        sliding_window: positions that a token sees at most, itself included; None for all.
        tied: the embedding serves as output head.
    """

    layers: int
    vocab_rows: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool
    family: str = "llama"
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    sliding_window: int | None = None


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: as in config.json.
        rules: the decoder layer's parameters.
        accepts: fields beyond those of every family -> the values that this package honours; an empty tuple marks a
            field that is read elsewhere or has no effect on the logits.
        qkv_bias: query, key and value projections have a bias.
        qk_norm: queries and keys are normed per head.
    """

    model_type: str
    rules: tuple[Rule, ...]
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
