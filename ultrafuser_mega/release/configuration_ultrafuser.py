"""Configuration of a fused model: its specialists' own configurations, the gate, and the shared vocabulary.

This file travels with the model; it imports transformers alone.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# The fused head takes logits = head(last hidden state): true of these, not of families that scale or cap logits.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


class UltraFuserConfig(PreTrainedConfig):
    """A fused model of n specialists.

    Args:
        specialists: one entry each, in the order of the gate weights (a list: JSON objects get sorted): ``name``,
            ``config`` (the specialist's own config.json, every field of it), ``template`` (what it reads before a
            response, see ``chat_format_ultrafuser``) and, where its tokenizer is not the folder's own, ``tokenizer``
            (the subfolder that holds it).
        vocab_size: entries of the shared vocabulary; every specialist's logits are cropped to it.
        gate_units: hidden units m of the gate.
        gate_shared: one first gate layer for all specialists, or one for each (hidden sizes that differ).
        eos_token_id: what stands behind every response, which need not be the tokenizer's EOS.
        response_lead: text between a prompt and its response that belongs to the response's first token.
        chat_marks: the ids that every conversation begins and ends with in the first specialist's template, BOS left
            out, as ``{"begins": [..], "ends": [..]}``; None where one template is every specialist's.

    ``num_hidden_layers``, ``hidden_size``, ``num_attention_heads`` and ``max_position_embeddings`` follow from the
    specialists (the largest; the smallest for the last) and are there for tools that ask every model for them.
    """

    model_type = "ultrafuser"

    specialists: list[dict[str, Any]] | None = None
    vocab_size: int = 0
    gate_units: int = 0
    gate_shared: bool = True
    response_lead: str = ""
    chat_marks: dict[str, list[int]] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        derived = {"num_hidden_layers": max, "hidden_size": max, "num_attention_heads": max}
        configs = [self.specialist_config(name) for name in self.names]
        for field, choose in {**derived, "max_position_embeddings": min}.items():
            kwargs.pop(field, None)
            setattr(self, field, choose((getattr(config, field) for config in configs), default=0))
        smallest = min((config.vocab_size for config in configs), default=0)
        if self.vocab_size > smallest:
            raise ValueError(f"vocab_size: {self.vocab_size} is more than the {smallest} rows of a specialist's head")
        super().__post_init__(**kwargs)

    @property
    def names(self) -> list[str]:
        """The specialists in the order of the gate weights."""
        return [entry["name"] for entry in self.specialists or []]

    def entry(self, name: str) -> dict[str, Any]:
        """What ``specialists`` holds of one of them."""
        return next(entry for entry in self.specialists or [] if entry["name"] == name)

    def specialist_config(self, name: str) -> PreTrainedConfig:
        """A fresh configuration object of one specialist; a ValueError for a family that would be fused wrongly."""
        fields = copy.deepcopy(self.entry(name)["config"])
        model_type = fields.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            supported = ", ".join(SUPPORTED_MODEL_TYPES)
            raise ValueError(f"specialists.{name}.config.model_type: {model_type!r} is not supported; use {supported}")
        return CONFIG_MAPPING[model_type].from_dict(fields)
