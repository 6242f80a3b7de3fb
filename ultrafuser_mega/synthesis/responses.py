"""Responses to all instructions, and, for a share of conversations, further turns of a played user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser_mega.synthesis.client import Asker
from ultrafuser_mega.synthesis.config import RESPONSES, USER
from ultrafuser_mega.synthesis.forms import any_text, one_text
from ultrafuser_mega.synthesis.instructions import Instruction, identity
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.requests import Call
from ultrafuser_mega.synthesis.templates import Templates


@dataclass
class Conversation:
    """One row of data. Replies are named by their keys: their texts, most of all that is made, stay in the ledger.

    Attributes:
        instruction: it begins with.
        said: what the user says, the instruction first.
        replies: key of the reply to each.
        user_keys: of the replies that made the user's further turns.
    """

    instruction: Instruction
    said: list[str]
    replies: list[str]
    user_keys: list[str]


async def respond(
    asker: Asker, of: str, pool: Sequence[Instruction], templates: Templates, left_out: LeftOut
) -> list[Conversation]:
    """A conversation for every instruction that gets a response, in their order."""
    data = asker.config.classes[of]
    replying = _Replying(asker, of, templates, left_out)
    begun = [Conversation(one, [one.text], [], []) for one in pool]
    conversations = await replying.reply(begun)
    by_chance = sorted(conversations, key=lambda one: identity(f"turns {one.instruction.id}"))
    going_on = by_chance[: round(data.turns.share * len(by_chance))]
    for _ in range(data.turns.most):
        going_on = await replying.go_on(going_on)
    return conversations


class _Replying:
    def __init__(self, asker: Asker, of: str, templates: Templates, left_out: LeftOut) -> None:
        self._asker, self._of, self._templates, self._left_out = asker, of, templates, left_out

    async def reply(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Those that got a reply to what was said last, which is in them."""
        version = self._templates.version(RESPONSES)
        calls = [Call(self._of, RESPONSES, self._messages(one), any_text(), version) for one in conversations]
        answered = []
        for one, call, answer in zip(conversations, calls, await self._asker.ask_all(calls), strict=True):
            self._left_out.faults(call, answer, one.instruction.topic, one.said[-1])
            if answer.value is not None:
                one.replies.append(str(answer.key))
                answered.append(one)
        return answered

    async def go_on(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Those that went on by a turn; the others are whole as they are."""
        prompt = self._templates.render(USER)
        version = self._templates.version(USER)
        calls = [
            Call(self._of, USER, (*self._messages(one), {"role": "user", "content": prompt}), one_text(), version)
            for one in conversations
        ]
        spoken = []
        for one, call, answer in zip(conversations, calls, await self._asker.ask_all(calls), strict=True):
            self._left_out.faults(call, answer, one.instruction.topic, one.said[-1])
            if answer.value is not None:
                spoken.append(one)
                one.said.append(answer.value)
                one.user_keys.append(str(answer.key))
        going_on = await self.reply(spoken)
        for one in spoken:
            if len(one.replies) < len(one.said):  # nobody answered the last turn
                one.said.pop()
                one.user_keys.pop()
        return going_on

    def _messages(self, conversation: Conversation) -> tuple[dict[str, str], ...]:
        """What a model sees of it: the first message as the template has it."""
        data = self._asker.config.classes[self._of]
        said = [self._templates.render(RESPONSES, instruction=conversation.said[0]), *conversation.said[1:]]
        messages = [{"role": "system", "content": data.system}] if data.system else []
        for turn, text in enumerate(said):
            messages.append({"role": "user", "content": text})
            if turn < len(conversation.replies):
                reply = self._asker.ledger.find(conversation.replies[turn])
                assert reply is not None
                messages.append({"role": "assistant", "content": reply.text})
        return tuple(messages)
