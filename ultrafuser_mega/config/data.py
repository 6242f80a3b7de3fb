"""``data``: instruction data, by class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from ultrafuser_mega.config.section import Section


class DataClass(Section):
    """One class of instruction data. A held-out set comes from its own files or from the head of training files.

    A file is JSON, JSONL (either may be gzipped) or Parquet.
    """

    train: list[Path] = Field(min_length=1, description="files, folders of files, or globs as in shards/*.jsonl.gz")
    weights: dict[Path, NonNegativeFloat] = Field(
        default_factory=dict,
        description="entry of train -> its share of the class's samples, by weight; all of them or none: rows alike",
    )
    heldout: list[Path] = Field(default_factory=list, description="the same, only evaluated on")
    heldout_first: dict[Path, PositiveInt] = Field(
        default_factory=dict, description="training file -> its first rows are held out instead of trained on"
    )
    columns: dict[Path, dict[str, str]] = Field(
        default_factory=dict,
        description="entry of train or heldout -> its names for a row's fields: {instruction: query, output: reply}",
    )

    @model_validator(mode="after")
    def _weights_of_all_entries(self) -> DataClass:
        if self.weights and set(self.weights) != set(self.train):
            weighed, entries = ", ".join(map(str, self.weights)), ", ".join(map(str, self.train))
            raise ValueError(f"weights weighs {weighed}; it must weigh exactly {entries}")
        if self.weights and not any(self.weights.values()):
            raise ValueError("weights: no entry has a weight; give one of them more than 0")
        return self


class Data(Section):
    """Instruction data, tokenised once into a memory-mapped store."""

    root: Path = Field(Path(), description="relative files below are taken from here")
    classes: dict[str, DataClass] = Field(min_length=1)
    store: Path | None = Field(None, description="where the token store is; default: <run folder>/store")
    sampling: Literal["balanced", "iid", "tokens"] | dict[str, NonNegativeFloat] = Field(
        "balanced",
        description="of a batch's samples: balanced: as many of each class; tokens: as many response tokens of each "
        "class, on the average; iid: all rows alike; or {class: weight, ..}: of each class by its weight",
    )
    max_length: int = Field(2048, ge=2, description="tokens of the longest specialist's sequence")
    on_malformed: Literal["skip", "fail"] = Field(
        "fail", description="a row that is no conversation: fail ends the run, skip leaves it out and counts it"
    )

    @field_validator("sampling", mode="before")
    @classmethod
    def _word_or_weights(cls, value: Any) -> Any:
        words = ("balanced", "iid", "tokens")
        if not isinstance(value, dict):
            if value not in words:
                raise ValueError(f"use {', '.join(words)}, or the classes' weights, as in {{text: 10, code: 1}}")
            return value
        for name, weight in value.items():
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise ValueError(f"{name} has the weight {weight!r}; use a number, at least 0")
        if not any(value.values()):
            raise ValueError("no class has a weight; give one of them more than 0")
        return value

    @model_validator(mode="after")
    def _weights_of_all_classes(self) -> Data:
        if isinstance(self.sampling, dict) and set(self.sampling) != set(self.classes):
            weighed, classes = ", ".join(map(str, self.sampling)), ", ".join(self.classes)
            raise ValueError(f"sampling weighs {weighed}; it must weigh exactly {classes}")
        if self.sampling == "iid" and self.file_weights:
            name = next(iter(self.file_weights))
            raise ValueError(f"sampling iid draws all rows alike, and classes.{name}.weights does not; leave one out")
        return self

    @property
    def file_weights(self) -> dict[str, list[float]]:
        """Class -> weight of each entry of its training files, of the classes that weigh them."""
        return {
            name: [part.weights[entry] for entry in part.train] for name, part in self.classes.items() if part.weights
        }
