"""Prompts in, answers out while they come: encodes prompts, feeds an engine, hands on its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.embedded import Serving, text_engine
from ultrafuser_mega.inference.lanes import answer_room, positions_of
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.requests import FailedEvent, Prompt, PromptEvent, Request
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.text_engine import Answer
from ultrafuser_mega.release.chat_ultrafuser import Messages


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
class Shown:
    """Text that may be shown now, with the gate weights of its token."""

    row: int
    text: str
    weights: list[float]


class Answerer:
    """Answers with one opened model. Its engine keeps what it has read: the next turn of a conversation, or prompts
    that begin alike, are read only where they are new.

    Args:
        opened: the model.
        serving: how answers are computed.

    Attributes:
        names: of the specialists.
        engine: of text.
    """

    def __init__(self, opened: OpenedModel, serving: Serving = Serving()) -> None:  # noqa: B008  frozen
        self.names = opened.model.names
        self._opened = opened
        self.engine = text_engine(opened, serving)

    def encode(self, conversation: Messages) -> Prompt:
        """A conversation that ends with a user message, each specialist's in its own template.

        Raises:
            InputError: roles out of order, text that a tokenizer would read as a control token, or no room for an
                answer.
        """
        for message in conversation:
            check_text(f"the {message['role']} message", message["content"])
        try:
            prompt: Prompt = self._opened.model.chat_ids([conversation], self._opened.tokenizer)[0]
        except ValueError as error:
            raise InputError(str(error)) from None
        answer_room(prompt, positions_of(self._opened.model))
        return prompt

    def encode_raw(self, text: str) -> Prompt:
        """Text to be continued as it stands, the same for all specialists."""
        model = self._opened.model
        ids = self._opened.tokenizer(text)["input_ids"]
        if not ids:
            raise InputError("the prompt is empty; give some text")
        if max(ids) >= (rows := model.config.vocab_size):
            raise InputError(f"the prompt holds token {max(ids)}, the vocabulary has {rows}; remove special text")
        return dict.fromkeys(model.names, ids)

    def stream(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        sampling: Sampling,
        *,
        lead: bool = True,
        first_row: int = 0,
    ) -> Iterator[Shown | tuple[int, Answer]]:
        """Answer prompts: text as it becomes certain, then (row, answer) when a row is done.

        Args:
            prompts: see ``encode`` and ``encode_raw``.
            limits: when answers end.
            sampling: how tokens are chosen.
            lead: whether answers begin with the white space that responses in the training data begin with.
            first_row: number of the first row.

        Raises:
            InputError: a prompt is too long, or the model gave no number.
        """
        rows: dict[str, list[list[float]]] = {}  # request -> gate weights of its tokens
        try:
            for row, prompt in enumerate(prompts, first_row):
                request = Request(str(row), prompt, sampling, limits.max_new_tokens, self._opened.eos, row)
                self.engine.submit(request, stop=limits.stop, lead=lead)
                rows[request.id] = []
            while rows:
                for event in self.engine.step():
                    if isinstance(event, FailedEvent):
                        raise InputError(event.message)
                    if isinstance(event, PromptEvent):
                        continue
                    weights = rows[event.id]
                    weights.append(event.token.weights)
                    for piece in event.pieces:
                        yield Shown(int(event.id), piece.text, weights[piece.token])
                    if event.answer is not None:
                        del rows[event.id]
                        yield int(event.id), event.answer
        finally:
            for id in rows:
                self.engine.cancel(id)
