"""``toy``: specialists that are made on the spot."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ultrafuser_mega.config.section import Section


class Toy(Section):
    """Toy specialists and their data; a folder's path alone stands for the usual trio there."""

    folder: Path = Field(description="where they are made when they are missing")
    branched: bool = Field(
        False, description="of one shape, each trained on from one base model, which is kept as <folder>/base"
    )
