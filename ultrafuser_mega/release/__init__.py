"""The fused model as a Hugging Face folder: the code that travels with it, and the writer of everything but weights.

``configuration_ultrafuser``, ``modeling_ultrafuser``, ``chat_ultrafuser`` and ``data/chat_format`` are copied verbatim
into every release folder and import nothing but torch and transformers; this package need not be installed where the
folder is used.
"""

from __future__ import annotations

from ultrafuser_mega.release.assemble import assemble_release
from ultrafuser_mega.release.card import CardFacts

__all__ = ["CardFacts", "assemble_release"]
