"""Qwen2 and Qwen2.5: Llama's layer with a bias on queries, keys and values; the small ones tie their embeddings."""

from __future__ import annotations

from ultrafuser_mega.models.families.family import Family
from ultrafuser_mega.models.families.rules import COMMON_LAYER, FusedQKV

#: Fields of both Qwen generations. The window fields have no effect while use_sliding_window is false.
QWEN_FIELDS: dict[str, tuple[bool, ...]] = {
    "use_sliding_window": (False,),
    "sliding_window": (),
    "max_window_layers": (),
}

QWEN2 = Family(
    model_type="qwen2",
    rules=(*COMMON_LAYER, FusedQKV("bias")),
    accepts=QWEN_FIELDS,
    qkv_bias=True,
)
