"""Tokens to text while they come: nothing is shown that a later token could change or a stop string take back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ultrafuser_mega.release.chat_ultrafuser import decode_response

_WINDOW = 24  # tokens; longer than any character, and than any pair of tokens that changes each other's text
_INCOMPLETE = "\ufffd"  # what decoding gives for a part of a character
_RARE = 8  # characters that are seldom in a stop string more than once


@dataclass(frozen=True)
class Piece:
    """Text that one token brought; ``token`` counts from 0."""

    token: int
    text: str


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of the model.
        lead: text that every response begins with and nobody wants to see (the configuration's ``response_lead``).
        stop: strings that end the answer; neither they nor what follows belongs to it.
        ends: tokens that end the answer; they have no text, whatever the tokenizer calls them.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(
        self, tokenizer: Any, lead: str, stop: Sequence[str] = (), ends: Collection[int] = frozenset()
    ) -> None:
        self._tokenizer, self._lead, self._stop, self._end_ids = tokenizer, lead, tuple(stop), ends
        self._ids: list[int] = []
        self._text = ""  # all that is certain
        self._final: str | None = None
        self._ends: list[int] = []  # where in it every token's part ends
        self._shown = self._open = 0  # characters, and tokens in front of the first one that may get other text
        self._window = 0, ""  # the first token that is decoded again with each new one, and the text before it
        self.stopped = False

    @property
    def text(self) -> str:
        """What the answer is so far, held-back parts included; in the end, what decoding all tokens at once gives."""
        return self._text if self._final is None else self._final

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._ids

    def pieces(self) -> list[Piece]:
        """One per token, its text possibly empty."""
        begins = [0, *self._ends[:-1]]
        return [Piece(i, self._text[a:b]) for i, (a, b) in enumerate(zip(begins, self._ends, strict=True))]

    def push(self, token: int) -> list[Piece]:
        """Take the next token; returns what may be shown now."""
        self._ids.append(token)
        begin, before = self._window
        lead = "" if begin else self._lead
        tail = self._decode(begin, lead)
        self._settle(before + tail.rstrip(_INCOMPLETE))
        if len(self._ids) - begin >= 2 * _WINDOW:
            self._slide(before + tail)
        return self._show(len(self._text) - self._possible_stop())

    def _slide(self, text: str) -> None:
        """Decode from a later token on, where that gives the same text: the whole answer again would be quadratic."""
        begin = len(self._ids) - _WINDOW
        tail = self._decode(begin, "")
        if tail and text.endswith(tail) and _INCOMPLETE not in tail:
            self._window = begin, text.removesuffix(tail)

    def finish(self) -> list[Piece]:
        """No token follows: what was held back, broken characters included."""
        whole = self._decode(0, self._lead)
        self._final = self._cut(whole)
        self._settle(whole)
        return self._show(len(self._text))

    def _decode(self, begin: int, lead: str) -> str:
        ids = self._ids[begin:]
        return decode_response(self._tokenizer, ids[:-1] if ids and ids[-1] in self._end_ids else ids, lead)

    def _cut(self, text: str) -> str:
        """Without the first stop string and what follows it."""
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        self.stopped = self.stopped or bool(found)
        return text[: min(found)] if found else text

    def _settle(self, text: str) -> None:
        text = self._cut(text)
        # Some decoders judge a run of bytes as a whole: what was a character is none any more. Shown is shown.
        self._text = self._text[: self._shown] + text[self._shown :]
        self._ends += [len(self._text)] * (len(self._ids) - len(self._ends))
        for token in range(self._open, len(self._ends)):
            self._ends[token] = min(self._ends[token], len(self._text))
        if self._ends:
            self._ends[-1] = len(self._text)

    def _possible_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max((begun(stop, self._text) for stop in self._stop), default=0)

    def _show(self, until: int) -> list[Piece]:
        shown, pieces = self._shown, []
        for token in range(self._open, len(self._ends)):
            end = min(self._ends[token], until)
            if shown < end:
                pieces.append(Piece(token, self._text[shown:end]))
                shown = end
        self._shown = shown
        while self._open < len(self._ends) - 1 and self._ends[self._open] <= shown:
            self._open += 1
        return pieces


def begun(stop: str, text: str) -> int:
    """Characters at the end of ``text`` that ``stop`` begins with, without its last."""
    most = min(len(stop) - 1, len(text))
    end = text[-_RARE:]
    place = stop.rfind(end, 0, most)
    while place >= 0:
        size = place + len(end)
        if text.endswith(stop[:size]):
            return size
        place = stop.rfind(end, 0, size - 1)
    return next((size for size in range(min(len(end) - 1, most), 0, -1) if text.endswith(stop[:size])), 0)
