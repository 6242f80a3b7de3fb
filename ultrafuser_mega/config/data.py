"""``data``: instruction data, by class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from ultrafuser_mega.config.section import Section


class DataClass(Section):
    """One class of instruction data. A held-out set comes from its own files or from the head of training files.

    A file is JSON, JSONL (either may be gzipped) or Parquet.
    """

    train: list[Path] = Field(min_length=1, description="files, folders of files, or globs as in shards/*.jsonl.gz")
    heldout: list[Path] = Field(default_factory=list, description="the same, only evaluated on")
    heldout_first: dict[Path, PositiveInt] = Field(
        default_factory=dict, description="training file -> its first rows are held out instead of trained on"
    )
    columns: dict[Path, dict[str, str]] = Field(
        default_factory=dict,
        description="entry of train or heldout -> its names for a row's fields: {instruction: query, output: reply}",
    )


class Data(Section):
    """Instruction data, tokenised once into a memory-mapped store."""

    root: Path = Field(Path(), description="relative files below are taken from here")
    classes: dict[str, DataClass] = Field(min_length=1)
    store: Path | None = Field(None, description="where the token store is; default: <run folder>/store")
    max_length: int = Field(2048, ge=2, description="tokens of the longest specialist's sequence")
    on_malformed: Literal["skip", "fail"] = Field(
        "fail", description="a row that is no conversation: fail ends the run, skip leaves it out and counts it"
    )
