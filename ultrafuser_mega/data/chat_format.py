"""One specialist's tokenizer and template: conversations to token ids, in training, generation and releases alike.

This file travels with exported models (release/assemble.py copies it), so it imports nothing of the package.

The prompt of a turn is what generation reads before it answers there: all messages up to and including the question.

    pieces               [BOS] first(q0)  response_0 END  later(q1)  response_1 END  ...  later(qk)
                         with the ids of the shared responses; special-token texts are ordinary characters.
    Jinja chat template  the ids of ``apply_chat_template(messages, add_generation_prompt=True)`` of transformers, no
                         more and no less: BOS where its author put it, earlier answers as it shows them by then.

A chat template is a program that may do anything to a text, so every rendering is compared with one in which markers
stand for the messages: system text, questions and answers must all be there, whole but for white space around them.
An answer alone may be shown in another form once it is history (templates that take away what was thought aloud).

Texts of pieces are put together as ids, and tokenizers differ in habits that corrupt that without a word: some put a
"▁" before the first word of whatever they are given, some only at the start of a text, some not at all. So text that
continues a sequence is encoded behind an anchor whose ids are then cut off, and is split as it would be in the middle
of a text: "Assistant:" + " Paris" gives "▁Paris" and no lone "▁".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ANCHORS = ("\n", ":", "a", "0", ")")  # a line break first: few tokenizers let it melt into a word
_AFTER_EOS_PROBES = ("\nUser", "[INST] x", " x", "User")
_TURNS_AT_ONCE = 16  # of a conversation; when none of them has room, no later one is looked at
_REMEMBERED = 64  # messages of the longest conversation whose markers are kept
_MARKER = "xQmessageQx"  # cases differ, so that a template which changes them is found out
_TEXT_OF = {"system": "system text", "user": "user's text", "assistant": "assistant's text"}

Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "..."}, ...]


class PromptError(ValueError):
    """A conversation that this template cannot put into words; the message is the reason, in one line."""


@dataclass(frozen=True, slots=True)
class Chat:
    """n questions with at least n - 1 answers between them; ``responses`` are the answers' ids, END included."""

    system: str | None
    users: Sequence[str]
    answers: Sequence[str]
    responses: Sequence[Sequence[int]]

    def messages(self, turn: int) -> list[dict[str, str]]:
        """Up to and including question ``turn`` (from 0)."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in zip(self.users[:turn], self.answers, strict=False):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.users[turn]}]


class SequenceTokenizer:
    """A fast tokenizer without its post-processing, for texts that stand anywhere in a sequence.

    All ids are plain lists of int; nothing is padded or truncated.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = re.compile("|".join(map(re.escape, specials)) or "(?!)")  # none: never matches
        self._anchor_ids = {anchor: self.encode([anchor], specials=False)[0] for anchor in _ANCHORS}
        self._later_anchors = self._find_later_anchors()

    def encode(self, texts: Sequence[str], *, specials: bool) -> list[list[int]]:
        """Each text as it stands; ``specials``: special-token texts are read as the tokens."""
        # The tokenizer sets all three again whenever it is called itself.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = not specials
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_first_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts that open a sequence, with one BOS in front (none if the tokenizer has none)."""
        bos = [] if self.bos_id is None else [self.bos_id]
        return [[*bos, *ids] for ids in self.encode(texts, specials=False)]

    def encode_later_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts that follow a response within a sequence, split as the tokenizer does after EOS."""
        return self._encode_behind(texts, self._later_anchors)

    def encode_responses(self, texts: Sequence[str], lead: str) -> list[list[int]]:
        """Texts that follow a prompt, without END. ``lead`` (" " or "") stands before each that does not bring its
        own white space. Special-token texts are ordinary characters."""
        spaced = [text if text[:1].isspace() else lead + text for text in texts]
        return self._encode_behind(spaced, _ANCHORS)

    def _encode_behind(self, texts: Sequence[str], anchors: Sequence[str]) -> list[list[int]]:
        """Encode each text behind the first anchor that does not melt into it."""
        result: list[list[int]] = [[] for _ in texts]
        waiting = list(range(len(texts)))
        for anchor in (*anchors, ""):
            prefix = self._anchor_ids[anchor] if anchor else []
            still_waiting = []
            encoded = self.encode([anchor + texts[place] for place in waiting], specials=False)
            for place, ids in zip(waiting, encoded, strict=True):
                if ids[: len(prefix)] == prefix:
                    result[place] = ids[len(prefix) :]
                else:
                    still_waiting.append(place)
            waiting = still_waiting
            if not waiting:
                break
        return result

    def _find_later_anchors(self) -> tuple[str, ...]:
        """The anchors behind which text is split as it is after EOS (none for most tokenizers)."""
        after_eos = self.encode([self.tokenizer.eos_token + text for text in _AFTER_EOS_PROBES], specials=True)
        expected = [ids[1:] if ids[:1] == [self.eos_id] else ids for ids in after_eos]
        for anchors in ((), *((anchor,) for anchor in _ANCHORS)):
            if self._encode_behind(_AFTER_EOS_PROBES, anchors) == expected:
                return (*anchors, *_ANCHORS) if anchors else ()
        return ()


@dataclass(frozen=True, slots=True)
class PieceTemplate:
    """Prompt texts around ``{instruction}``: ``first`` opens the sequence, ``later`` stands between two responses.

    They have no place for a system text, so it is put before the first question with a blank line between them.
    """

    first: str
    later: str

    def texts(self, chat: Chat) -> list[str]:
        """What stands before each response, from the response before it or the start."""
        opening = f"{chat.system}\n\n{chat.users[0]}" if chat.system else chat.users[0]
        filled = [self.first.replace("{instruction}", opening)]
        return filled + [self.later.replace("{instruction}", user) for user in chat.users[1:]]

    def prompts(
        self, tokenizer: SequenceTokenizer, chats: Sequence[Chat], most: int | None = None
    ) -> list[list[list[int]] | PromptError]:
        """Of each conversation the ids before each of its turns, from the start of the sequence; none behind the first
        of more than ``most`` ids, as all that follow have more."""
        texts = [self.texts(chat) for chat in chats]
        first = tokenizer.encode_first_prompts([pieces[0] for pieces in texts])
        later = iter(tokenizer.encode_later_prompts([text for pieces in texts for text in pieces[1:]]))
        result: list[list[list[int]] | PromptError] = []
        for opening, chat in zip(first, chats, strict=True):
            prompts = [opening]
            following = [next(later) for _ in chat.users[1:]]
            for response, prompt in zip(chat.responses, following, strict=False):
                if most is not None and len(prompts[-1]) > most:
                    break
                prompts.append([*prompts[-1], *response, *prompt])
            result.append(prompts)
        return result

    def prompt(self, tokenizer: SequenceTokenizer, chat: Chat) -> list[int]:
        """The ids before the last turn."""
        opening, *following = self.texts(chat)
        (ids,) = tokenizer.encode_first_prompts([opening])
        later = tokenizer.encode_later_prompts(following)
        for response, prompt in zip(chat.responses, later, strict=False):
            ids += [*response, *prompt]
        return ids


class JinjaTemplate:
    """A Hugging Face chat template, rendered by transformers itself."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._marked: dict[tuple[str, ...], str] = {}

    def prompts(
        self, tokenizer: SequenceTokenizer, chats: Sequence[Chat], most: int | None = None
    ) -> list[list[list[int]] | PromptError]:
        """Of each conversation the ids before each of its turns, from the start of the sequence, or why there are
        none: the template fails or loses a text, or a text holds a control token.

        A turn's prompt may have fewer ids than the one before, where history is shown shortened. So it takes some
        turns in a row of more than ``most`` ids for the later ones to be left out; the last one there is has more.
        """
        found: list[list[list[int]] | PromptError] = [[] for _ in chats]
        going_on, first = list(range(len(chats))), 0
        while going_on:
            texts: dict[int, list[str]] = {}
            for place in going_on:
                turns = range(first, min(first + _TURNS_AT_ONCE, len(chats[place].users)))
                try:
                    texts[place] = self.texts(tokenizer, chats[place], turns)
                except PromptError as error:
                    found[place] = error
            encoded = iter(tokenizer.encode([text for own in texts.values() for text in own], specials=True))
            going_on, first = [], first + _TURNS_AT_ONCE
            for place, own in texts.items():
                new, before = [next(encoded) for _ in own], found[place]
                assert not isinstance(before, PromptError)
                before += new
                has_room = most is None or any(len(ids) <= most for ids in new)
                if first < len(chats[place].users) and has_room:
                    going_on.append(place)
        return found

    def prompt(self, tokenizer: SequenceTokenizer, chat: Chat) -> list[int]:
        """The ids before the last turn. Raises PromptError."""
        messages = chat.messages(len(chat.users) - 1)
        _refuse_control_tokens(tokenizer, messages)
        return tokenizer.encode([self._render(tokenizer, messages)], specials=True)[0]

    def texts(self, tokenizer: SequenceTokenizer, chat: Chat, turns: range | None = None) -> list[str]:
        """What generation continues at each turn, or some of them, from the start of the sequence. Raises
        PromptError."""
        turns = range(len(chat.users)) if turns is None else turns
        if turns.start == 0:
            _refuse_control_tokens(tokenizer, chat.messages(len(chat.users) - 1))
        return [self._render(tokenizer, chat.messages(turn)) for turn in turns]

    def apply(self, tokenizer: SequenceTokenizer, messages: Messages, *, for_generation: bool = True) -> str:
        """The template's text as it comes. Raises PromptError where the template fails, whatever the way."""
        given = [dict(message) for message in messages]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": for_generation}
        try:
            return str(tokenizer.tokenizer.apply_chat_template(given, chat_template=self.text, **options))
        except Exception as error:  # a template is a program: it may raise anything
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise PromptError(f"the chat template refuses the conversation: {reason}") from None

    def _render(self, tokenizer: SequenceTokenizer, messages: Messages) -> str:
        """The text that generation continues after ``messages``, which all show in it. Raises PromptError."""
        text = self.apply(tokenizer, messages)
        roles = tuple(message["role"] for message in messages)
        marked = self._marked.get(roles)
        if marked is None:
            marked = self.apply(tokenizer, marked_messages(roles))
            check_markers(marked, roles, among=("system", "user", "assistant"))
            if len(roles) <= _REMEMBERED:
                self._marked[roles] = marked
        if _first_lost(marked, text, messages, _MARKER) is None:
            return text
        # The template looks into the messages. It may do so with answers that are history, but not with the others.
        prefix = _MARKER
        while any(prefix in message["content"] for message in messages):
            prefix += "x"
        marks = [
            message if message["role"] == "assistant" else mark
            for message, mark in zip(messages, marked_messages(roles, prefix), strict=True)
        ]
        lost = _first_lost(self.apply(tokenizer, marks), text, messages, prefix)
        if lost is not None:
            raise PromptError(f"the chat template drops or alters the {_TEXT_OF[roles[lost]]} (message {lost + 1})")
        return text


def marked_messages(roles: Sequence[str], prefix: str = _MARKER) -> list[dict[str, str]]:
    """Messages of these roles, each with a marker for a text."""
    return [{"role": role, "content": marker(place, prefix)} for place, role in enumerate(roles)]


def marker(place: int, prefix: str = _MARKER) -> str:
    """What stands for message ``place``."""
    return f"{prefix}{place}z"


def check_markers(text: str, roles: Sequence[str], among: Sequence[str]) -> None:
    """PromptError unless the markers of roles ``among`` stand in ``text`` once each and in their order; a system text
    may stand anywhere and more than once."""
    places = []
    for place, role in enumerate(roles):
        if role not in among:
            continue
        count = text.count(marker(place))
        if count == 0 or (role != "system" and count > 1):
            raise PromptError(f"the chat template drops, repeats or alters the {_TEXT_OF[role]}")
        if role != "system":
            places.append(text.index(marker(place)))
    if places != sorted(places):
        raise PromptError("the chat template changes the order of the messages")


def _first_lost(marked: str, text: str, messages: Messages, prefix: str) -> int | None:
    """The first message that does not stand in ``text`` where its marker stands in ``marked``; None: all do.

    White space around a message may have been taken away. What stands between messages must be the same too, and
    every message but an assistant's must have a marker.
    """
    opening, *parts = re.split(f"{prefix}([0-9]+)z", marked)
    if not text.startswith(opening):
        return 0
    at, found = len(opening), {place for place, message in enumerate(messages) if message["role"] == "assistant"}
    for number, between in zip(parts[::2], parts[1::2], strict=True):
        place = int(number)
        content = messages[place]["content"]
        for shown in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(shown + between, at):
                at += len(shown) + len(between)
                found.add(place)
                break
        else:
            return place
    return next((place for place in range(len(messages)) if place not in found), None if at == len(text) else 0)


def _refuse_control_tokens(tokenizer: SequenceTokenizer, messages: Messages) -> None:
    for message in messages:
        if found := tokenizer.control_tokens.search(message["content"]):
            what = _TEXT_OF[message["role"]]
            raise PromptError(f"the {what} holds {found.group()}, which would be read as a control token")
