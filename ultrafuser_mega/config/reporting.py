"""``report`` and ``profile``: where a run's numbers go beside its folder, and which steps are looked into."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, field_validator

from ultrafuser_mega.config.section import Section


class Report(Section):
    """Beside metrics.jsonl and TensorBoard; the numbers have the same names everywhere (docs/metrics.md)."""

    wandb: str | None = Field(
        None, min_length=1, description="Weights & Biases project; needs wandb, whose WANDB_MODE=offline is heeded"
    )
    prometheus: Path | None = Field(
        None, description="a .prom file for node_exporter's textfile collector, replaced at every step"
    )

    @field_validator("prometheus")
    @classmethod
    def _is_collected(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError("node_exporter reads files that end in .prom alone; name it so")
        return path


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Profile(Section):
    """A torch.profiler trace of some steps."""

    steps: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        None, description="first:last, both among them, or one step; counted through both stages as in metrics.jsonl"
    )
    ranks: list[NonNegativeInt] = Field([0], min_length=1, description="which write one")

    @field_validator("steps")
    @classmethod
    def _is_a_span(cls, steps: str | None) -> str | None:
        if steps is not None and _span(steps) is None:
            raise ValueError("expected first:last or one step, counted from 1, as in 10:12")
        return steps

    @property
    def span(self) -> range:
        """The steps; empty: none."""
        return range(0) if self.steps is None else _span(self.steps) or range(0)


def _span(steps: str) -> range | None:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
    if found is None:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    return range(first, last + 1) if 1 <= first <= last else None
