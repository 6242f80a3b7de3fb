"""Conversations to token ids, so that the response tokens of all specialists are the same tokens.

Each response is tokenised once and the shared ending put behind it; the same ids follow every specialist's own
prompt. The prompt of a turn is what generation reads before it answers there (chat_format.py). Where that is, for
every specialist, what the sequence holds so far and more, the turn goes on with the sequence:

    prompt_0[s] response_0 prompt_1[s] response_1 ...

Some chat templates show earlier messages otherwise once they are history: the system text moves to the last question,
what was thought aloud is gone, white space is trimmed. Then the turn begins a sequence of its own, for all specialists
alike, whose prompt is the whole conversation up to there. So a conversation becomes one sample or several. A turn that
is not trained is a part of the next trained turn's prompt.

What does not fit into ``max_length`` tokens for the specialist with the longest sequence is cut off at
the same response token for all of them; a response that was cut has no ending. Behind 16 turns in a row without room
none is looked at any more: a conversation of any number of turns takes what those that fit take. It is dropped, with a
reason, when not even one token of its first response fits, when a template cannot render it, or when one of its tokens
lies beyond the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ultrafuser_mega.data.chat_format import Chat, PromptError
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.data.templates import Template, response_format
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.errors import InputError

TOO_LONG = "prompt too long"
BEYOND_VOCABULARY = "token beyond the shared vocabulary"
UNFIT = "template cannot render it"
_AT_ONCE, _TURNS_AT_ONCE = 64, 512  # conversations, and turns of them, whose prompts are in memory, each a whole one


@dataclass(frozen=True, slots=True)
class Aligned:
    """One conversation: ``prompts[s][t]`` and ``responses[t]`` are the ids of trained turn t.

    A turn in ``starts`` (the first always) begins a sequence of its own; the prompt of any other is what stands
    between its response and the one before. ``was_cut`` if max_length cut something off.
    """

    prompts: dict[str, list[list[int]]]
    responses: list[list[int]]
    was_cut: bool
    starts: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Dropped:
    """``reason`` is one of the three kinds above (counted in the report), ``detail`` says which and where."""

    reason: str
    detail: str


class Aligner:
    """Templates and tokenizers of all specialists, applied to batches of conversations."""

    def __init__(
        self,
        encoders: Mapping[str, TextEncoder],
        templates: Mapping[str, Template],
        vocab_size: int,
        max_length: int,
    ) -> None:
        if max_length < 2:
            raise InputError(f"max_length is {max_length}; expected at least 2 tokens")
        self.encoders = dict(encoders)
        self.templates = dict(templates)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.format = response_format(self.encoders, self.templates, vocab_size)

    def align(self, conversations: Sequence[Conversation]) -> list[Aligned | Dropped]:
        """One result per conversation, in order."""
        results: list[Aligned | Dropped] = []
        for some in _together(conversations):
            results += self._align(some)
        return results

    def _align(self, conversations: Sequence[Conversation]) -> list[Aligned | Dropped]:
        responses = self._encode_responses(conversations)
        chats = []
        for conversation, ids in zip(conversations, responses, strict=True):
            users, answers = zip(*conversation.turns, strict=True)
            chats.append(Chat(conversation.system, users, answers, ids))
        most = self.max_length - 1  # of a prompt that leaves room for a token
        prompts = {
            name: template.prompts(self.encoders[name], chats, most) for name, template in self.templates.items()
        }
        results: list[Aligned | Dropped] = []
        for place, (conversation, ids) in enumerate(zip(conversations, responses, strict=True)):
            own: dict[str, list[list[int]]] = {}
            unfit: list[Dropped] = []
            for name, of_all in prompts.items():
                turns = of_all[place]
                if isinstance(turns, PromptError):
                    unfit.append(Dropped(UNFIT, f"{name}: {turns}"))
                elif not turns[0]:  # no BOS and no text: no position could predict the first response token
                    unfit.append(Dropped(UNFIT, f"{name}: the first prompt is empty"))
                else:
                    own[name] = turns
            trained = [turn for turn in range(len(ids)) if turn not in conversation.untrained]
            results.append(unfit[0] if unfit else self._beyond_vocabulary(own, ids) or self._fit(own, ids, trained))
        return results

    def _encode_responses(self, conversations: Sequence[Conversation]) -> list[list[list[int]]]:
        encoder = next(iter(self.encoders.values()))
        texts = [response for conversation in conversations for _, response in conversation.turns]
        encoded = iter(encoder.encode_responses(texts, self.format.lead))
        return [[[*next(encoded), self.format.end_id] for _ in conversation.turns] for conversation in conversations]

    def _beyond_vocabulary(self, prompts: dict[str, list[list[int]]], responses: list[list[int]]) -> Dropped | None:
        for where, turns in (("response", responses), *((f"prompt of {name}", own) for name, own in prompts.items())):
            for ids in turns:
                if ids and max(ids) >= self.vocab_size:
                    return Dropped(BEYOND_VOCABULARY, f"{where}: id {max(ids)}, shared vocabulary {self.vocab_size}")
        return None

    def _fit(
        self, prompts: dict[str, list[list[int]]], responses: list[list[int]], trained: Sequence[int]
    ) -> Aligned | Dropped:
        """``prompts[s][t]``: all that comes before response t, from the start; ``trained``: turns. Where turns were
        left out, the last prompt that there is leaves no room, and stands for theirs."""
        pieces: dict[str, list[list[int]]] = {name: [] for name in prompts}
        kept: list[list[int]] = []
        starts: list[int] = []
        sequences: dict[str, list[int]] = {}  # what was put together so far
        for turn in trained:
            whole = {name: own[min(turn, len(own) - 1)] for name, own in prompts.items()}
            longest = max(whole, key=lambda name: len(whole[name]))
            room = self.max_length - len(whole[longest])
            if room < 1 and not kept:
                used = len(whole[longest])
                return Dropped(TOO_LONG, f"{longest}: {used} prompt tokens, max_length {self.max_length}")
            if room < 1:
                continue  # a later turn may have a shorter prompt, where history is shown shortened
            if not sequences or any(whole[name][: len(ids)] != ids for name, ids in sequences.items()):
                starts.append(len(kept))
                sequences = {name: [] for name in prompts}
            kept.append(responses[turn][:room])
            for name, ids in whole.items():
                pieces[name].append(ids[len(sequences[name]) :])
                sequences[name] = ids + kept[-1]
        was_cut = sum(map(len, kept)) < sum(len(responses[turn]) for turn in trained)
        return Aligned(pieces, kept, was_cut, tuple(starts))


def _together(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    some: list[Conversation] = []
    turns = 0
    for conversation in conversations:
        if some and (len(some) == _AT_ONCE or turns + len(conversation.turns) > _TURNS_AT_ONCE):
            yield some
            some, turns = [], 0
        some.append(conversation)
        turns += len(conversation.turns)
    if some:
        yield some
