"""Conversations in the forms that templates, the aligner and transformers take."""

from __future__ import annotations

from ultrafuser_mega.data.align import Aligned
from ultrafuser_mega.data.chat_format import Chat
from ultrafuser_mega.data.conversation import Conversation


def as_chat(conversation: Conversation) -> Chat:
    """Without ids of its responses."""
    users, answers = zip(*conversation.turns, strict=True)
    return Chat(conversation.system, users, answers, [[]] * len(answers))


def as_messages(conversation: Conversation, turn: int | None = None) -> list[dict[str, str]]:
    """Up to question ``turn``, the last one unless told; what is to be answered comes last."""
    return as_chat(conversation).messages(len(conversation.turns) - 1 if turn is None else turn)


def whole_prompts(aligned: Aligned) -> list[dict[str, list[int]]]:
    """Of each trained turn, specialist -> all that its response is predicted from."""
    prompts: list[dict[str, list[int]]] = []
    for turn, response in enumerate(aligned.responses):
        if turn in aligned.starts:
            sequences: dict[str, list[int]] = {name: [] for name in aligned.prompts}
        prompts.append({name: sequences[name] + own[turn] for name, own in aligned.prompts.items()})
        sequences = {name: ids + response for name, ids in prompts[-1].items()}
    return prompts
