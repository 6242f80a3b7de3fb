"""The families of models that can be specialists, one small file each: what sets them apart from Llama.

A family says which fields of its config.json are understood, and how its Hugging Face tensors map to the
parameters of Megatron-core's decoder layer (``rules``). The same table serves reading shards for training and
writing tensors back. A new family is one file beside this one, a line in ``FAMILIES`` and a line in its test.
"""

from __future__ import annotations

from ultrafuser_mega.models.families.family import Architecture, Family, LinearScaling, Llama3Scaling
from ultrafuser_mega.models.families.llama import LLAMA
from ultrafuser_mega.models.families.mistral import MISTRAL
from ultrafuser_mega.models.families.qwen2 import QWEN2
from ultrafuser_mega.models.families.qwen3 import QWEN3

#: model_type of config.json -> family
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "Architecture", "Family", "LinearScaling", "Llama3Scaling"]
