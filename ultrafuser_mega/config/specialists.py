"""``specialists``: the models to fuse."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ultrafuser_mega.config.section import Section


class Specialist(Section):
    """One specialist: a Hugging Face folder and the conversation template it was trained with."""

    path: Path = Field(description="Hugging Face folder (config.json, safetensors, tokenizer)")
    template: str = Field("hf", description="ultralm, codellama, wizardmath (paper, table 9), or hf: the folder's own")
