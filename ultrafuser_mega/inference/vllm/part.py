"""Which part of a fused model an engine is; stands in the config.json that vLLM reads, under ``ultrafuser``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FIELD = "ultrafuser"


@dataclass(frozen=True)
class Part:
    """One specialist of a fused model.

    Attributes:
        model: the whole, as ``address`` has it.
        name: of the specialist.
        vocab_size: entries of the shared vocabulary.
        gate_units: of the gate.
        gate_shared: see ``UltraFuserConfig``.
        widths: specialist -> hidden size, in the order of the gate weights.
    """

    model: str
    name: str
    vocab_size: int
    gate_units: int
    gate_shared: bool
    widths: dict[str, int]

    @classmethod
    def of(cls, config: Any) -> Part:
        """From the configuration of an engine's model."""
        return cls(**getattr(config, FIELD))

    @property
    def leads(self) -> bool:
        """Whether it chooses the tokens: the first specialist."""
        return self.name == next(iter(self.widths))
