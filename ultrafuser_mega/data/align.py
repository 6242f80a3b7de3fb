"""Conversations to token ids, so that the response tokens of all specialists are the same tokens.

Each response is tokenised once and EOS put at its end; the same ids follow every specialist's own
prompt. The sequence of specialist s is

    prompt_0[s] response_0 prompt_1[s] response_1 ...          prompt_0[s] opens with the one BOS

A turn that is not trained stands in the same place, but its ids count as a part of the next trained turn's prompt.

What does not fit into ``max_length`` tokens for the specialist with the longest sequence is cut off at
the same response token for all of them; a response that was cut has no EOS. A conversation is dropped,
with a reason, when not even one token of its first response fits, when a template cannot render it, or
when one of its tokens lies beyond the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.data.templates import Template, UnfitConversationError
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.errors import InputError

TOO_LONG = "prompt too long"
BEYOND_VOCABULARY = "token beyond the shared vocabulary"
UNFIT = "template cannot render it"


@dataclass(frozen=True, slots=True)
class Aligned:
    """``prompts[s][t]`` and ``responses[t]`` are the ids of trained turn t; ``was_cut`` if max_length cut it."""

    prompts: dict[str, list[list[int]]]
    responses: list[list[int]]
    was_cut: bool


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
        # The ids are shared, so one answer for all: a space, if any specialist expects one.
        self.response_lead = " " if any(template.response_lead for template in templates.values()) else ""

    def align(self, conversations: Sequence[Conversation]) -> list[Aligned | Dropped]:
        """One result per conversation, in order."""
        results: list[Aligned | Dropped | None] = [None] * len(conversations)
        texts: dict[str, list[list[str]]] = {}
        for name, template in self.templates.items():
            texts[name] = []
            for place, conversation in enumerate(conversations):
                try:
                    texts[name].append(template.prompts(conversation))
                except UnfitConversationError as error:
                    results[place] = results[place] or Dropped(UNFIT, f"{name}: {error}")
                    texts[name].append([""] * len(conversation.turns))
        prompts = {name: self._encode_prompts(name, texts[name]) for name in self.encoders}
        responses = self._encode_responses(conversations)
        for place in range(len(conversations)):
            if results[place] is None:
                own = {name: prompts[name][place] for name in prompts}
                results[place] = self._beyond_vocabulary(own, responses[place]) or self._fit(
                    *_trained_turns(own, responses[place], conversations[place].untrained)
                )
        return results  # type: ignore[return-value]  # no None is left

    def _encode_prompts(self, name: str, texts: list[list[str]]) -> list[list[list[int]]]:
        encoder, specials = self.encoders[name], self.templates[name].writes_special_tokens
        first = encoder.encode_first_prompts([turns[0] for turns in texts], specials=specials)
        later = iter(encoder.encode_later_prompts([text for turns in texts for text in turns[1:]], specials=specials))
        return [[ids, *(next(later) for _ in turns[1:])] for ids, turns in zip(first, texts, strict=True)]

    def _encode_responses(self, conversations: Sequence[Conversation]) -> list[list[list[int]]]:
        encoder = next(iter(self.encoders.values()))
        texts = [response for conversation in conversations for _, response in conversation.turns]
        encoded = iter(encoder.encode_responses(texts, self.response_lead))
        return [[[*next(encoded), encoder.eos_id] for _ in conversation.turns] for conversation in conversations]

    def _beyond_vocabulary(self, prompts: dict[str, list[list[int]]], responses: list[list[int]]) -> Dropped | None:
        for where, turns in (("response", responses), *((f"prompt of {name}", own) for name, own in prompts.items())):
            for ids in turns:
                if ids and max(ids) >= self.vocab_size:
                    return Dropped(BEYOND_VOCABULARY, f"{where}: id {max(ids)}, shared vocabulary {self.vocab_size}")
        return None

    def _fit(self, prompts: dict[str, list[list[int]]], responses: list[list[int]]) -> Aligned | Dropped:
        used = dict.fromkeys(prompts, 0)
        kept: list[list[int]] = []
        for turn, response in enumerate(responses):
            for name in prompts:
                used[name] += len(prompts[name][turn])
            longest = max(used, key=used.__getitem__)
            if not all(used.values()):  # no BOS and no text: no position could predict the first response token
                return Dropped(UNFIT, f"{min(used, key=used.__getitem__)}: the first prompt is empty")
            room = self.max_length - used[longest]
            if room < 1:
                if turn == 0:
                    return Dropped(TOO_LONG, f"{longest}: {used[longest]} prompt tokens, max_length {self.max_length}")
                break
            kept.append(response[:room])
            if room < len(response):
                break
            for name in prompts:
                used[name] += len(response)
        was_cut = len(kept) < len(responses) or len(kept[-1]) < len(responses[len(kept) - 1])
        return Aligned({name: own[: len(kept)] for name, own in prompts.items()}, kept, was_cut)


def _trained_turns(
    prompts: dict[str, list[list[int]]], responses: list[list[int]], untrained: frozenset[int]
) -> tuple[dict[str, list[list[int]]], list[list[int]]]:
    """The same sequences, where the turns of ``untrained`` are a part of the next trained turn's prompt."""
    if not untrained:
        return prompts, responses
    trained = [turn for turn in range(len(responses)) if turn not in untrained]
    bounds = [0, *(turn + 1 for turn in trained)]
    joined: dict[str, list[list[int]]] = {name: [] for name in prompts}
    for name, own in prompts.items():
        for start, turn in zip(bounds, trained, strict=False):
            context = [ids for before in range(start, turn) for ids in (own[before], responses[before])]
            joined[name].append([token for ids in (*context, own[turn]) for token in ids])
    return joined, [responses[turn] for turn in trained]
