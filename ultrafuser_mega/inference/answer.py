"""Prompts in, answers out while they come: encodes prompts, decodes, turns tokens into text, keeps gate weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.decoder import Decoder
from ultrafuser_mega.inference.lanes import Prompt
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.text import Piece, TextStream
from ultrafuser_mega.release.chat_ultrafuser import Messages

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Limits:
    """When an answer ends.

    Attributes:
        max_new_tokens: at the latest.
        stop: strings that end it.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens}: expected 1 or more")
        if "" in self.stop:
            raise InputError("--stop: the empty string would end every answer at once; leave it out")


def check_text(what: str, text: str) -> None:
    """InputError where ``text`` is empty or no Unicode, as bytes that are not UTF-8 become on the command line."""
    if not text.strip():
        raise InputError(f"{what} is empty; give some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not UTF-8 at character {error.start}; convert it first") from None


@dataclass(frozen=True)
class TracedToken:
    """One token of an answer: what it added to the text, and the gate weights that chose it."""

    id: int
    text: str
    weights: list[float]


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without control tokens, stop string and what follows it.
        tokens: as generated, the ending one included.
        finish_reason: "eos", "stop" (a stop string) or "length".
    """

    text: str
    tokens: list[TracedToken]
    finish_reason: FinishReason

    def mean_weights(self) -> list[float]:
        """Average gate weight of each specialist over the tokens."""
        columns = zip(*(token.weights for token in self.tokens), strict=True)
        return [sum(column) / len(self.tokens) for column in columns]


@dataclass(frozen=True)
class Shown:
    """Text that may be shown now, with the gate weights of its token."""

    row: int
    text: str
    weights: list[float]


class Answerer:
    """Answers with one opened model; keeps its caches from one conversation's turn to the next."""

    def __init__(self, opened: OpenedModel) -> None:
        self.names = opened.model.names
        self._opened = opened
        self._decoder = Decoder(opened.model, opened.rule)

    def encode(self, conversation: Messages) -> Prompt:
        """A conversation that ends with a user message, each specialist's in its own template.

        Raises:
            InputError: roles out of order, text that a tokenizer would read as a control token, or no room for an
                answer.
        """
        for message in conversation:
            check_text(f"the {message['role']} message", message["content"])
        try:
            prompt = self._opened.model.chat_ids([conversation], self._opened.tokenizer)[0]
        except ValueError as error:
            raise InputError(str(error)) from None
        self._decoder.room(prompt)
        return prompt

    def encode_raw(self, text: str) -> Prompt:
        """Text to be continued as it stands, the same for all specialists."""
        ids = self._opened.tokenizer(text)["input_ids"]
        if not ids:
            raise InputError("the prompt is empty; give some text")
        if max(ids) >= (rows := self._opened.model.config.vocab_size):
            raise InputError(f"the prompt holds token {max(ids)}, the vocabulary has {rows}; remove special text")
        return dict.fromkeys(self.names, ids)

    def stream(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        sampling: Sampling,
        *,
        lead: bool = True,
        first_row: int = 0,
        at_once: int | None = None,
    ) -> Iterator[Shown | tuple[int, Answer]]:
        """Answer prompts: text as it becomes certain, then (row, answer) when a row is done.

        Args:
            prompts: see ``encode`` and ``encode_raw``.
            limits: when answers end.
            sampling: how tokens are chosen.
            lead: whether answers begin with the white space that responses in the training data begin with.
            first_row: number of the first row.
            at_once: rows that are under way at a time; None: all.
        """
        opened = self._opened
        prefix = opened.model.config.response_lead if lead else ""
        texts = {
            first_row + i: TextStream(opened.tokenizer, prefix, limits.stop, opened.eos) for i in range(len(prompts))
        }
        weights: dict[int, list[list[float]]] = {row: [] for row in texts}
        decoding = self._decoder.decode(
            prompts,
            max_new_tokens=limits.max_new_tokens,
            sampling=sampling,
            eos=opened.eos,
            first_row=first_row,
            at_once=at_once,
        )

        def shown(row: int, pieces: list[Piece]) -> Iterator[Shown]:
            for piece in pieces:
                yield Shown(row, piece.text, weights[row][piece.token])

        for step in decoding:
            for row, token, gate in zip(step.rows, step.tokens, step.weights.tolist(), strict=True):
                text = texts[row]
                weights[row].append(gate)
                yield from shown(row, text.push(token))
                length = len(text.ids)
                if not (token in opened.eos or text.stopped or length == decoding.longest[row]):
                    continue
                decoding.end_row(row)
                yield from shown(row, text.finish())
                reason: FinishReason = "eos" if token in opened.eos else "stop" if text.stopped else "length"
                yield row, Answer(text.text, _traced(text, weights[row]), reason)


def _traced(text: TextStream, weights: list[list[float]]) -> list[TracedToken]:
    return [
        TracedToken(token, piece.text, gate)
        for token, piece, gate in zip(text.ids, text.pieces(), weights, strict=True)
    ]
