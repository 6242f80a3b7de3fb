"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Progress:
    """How far a run is: ``step`` steps of ``stage`` are done, ``skipped`` of which updated nothing."""

    stage: int
    step: int
    skipped: int = field(default=0, compare=False)

    @property
    def folder(self) -> str:
        """Name of the checkpoint folder."""
        return f"stage{self.stage}-step{self.step:07d}"
