"""Stands here for ``data/chat_format.py``, which is copied into every release under this name."""

from ultrafuser_mega.data.chat_format import (
    Chat,
    JinjaTemplate,
    Messages,
    PieceTemplate,
    SequenceTokenizer,
)

__all__ = ["Chat", "JinjaTemplate", "Messages", "PieceTemplate", "SequenceTokenizer"]
