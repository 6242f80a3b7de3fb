"""Who is evaluated: a model on this machine, or one behind an OpenAI-compatible endpoint; both answer conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import NOT_ASKED
from ultrafuser_mega.openai_client import one_line, open_client

if TYPE_CHECKING:
    from ultrafuser_mega.inference.model import OpenedModel  # brings torch: seconds

Messages = Sequence[dict[str, str]]

_ENDPOINT = "openai:"


@dataclass(frozen=True)
class Reply:
    """An answer to a conversation.

    Attributes:
        text: of the answer.
        tokens: how many it has.
        finish: why it ended: "eos", "stop", "length"; or, where there is none, why not.
        gate: specialist -> average weight over its tokens.
    """

    text: str
    tokens: int
    finish: str
    gate: dict[str, float] = field(default_factory=dict)


class Answering(Protocol):
    """A model that is ready."""

    def answer(self, conversations: Sequence[Messages], max_new_tokens: int) -> Iterator[tuple[int, Reply]]:
        """(number of the conversation, reply) for all of them, as they are done."""

    def harness_model(self, benchmark: str) -> Any:
        """lm-evaluation-harness's model class over it; InputError where ``benchmark`` cannot have that."""


@dataclass(frozen=True)
class Contestant:
    """A model of the table.

    Attributes:
        name: of its row.
        address: as the user wrote it.
        identity: what must be the same for its answers to be the same, but for how they are computed.
        opened: makes it ready for as long as the context lasts.
    """

    name: str
    address: str
    identity: str
    opened: Callable[[], AbstractContextManager[Answering]]


@dataclass(frozen=True)
class Computing:
    """How models of this machine compute.

    Attributes:
        batch_size: conversations that are answered at once.
        device: see :func:`ultrafuser_mega.inference.model.opened_model`.
        dtype: likewise.
    """

    batch_size: int = 32
    device: str = "auto"
    dtype: str | None = None


def contestant(text: str, computing: Computing) -> Contestant:
    """From ``[NAME=]ADDRESS``, where the address is one of :mod:`ultrafuser_mega.inference.address` or
    ``openai:MODEL@URL``.

    Raises:
        InputError: there is no such model, or the client is not installed.
    """
    name, equals, address = text.partition("=")
    if not equals or Path(text).exists() or "/" in name:
        name = address = text
    elif not name.isprintable():
        raise InputError(f"MODEL {text!r}: its name holds what cannot be printed; choose another")
    elif not name:
        raise InputError(f"MODEL {text}: a name is missing; expected NAME=ADDRESS, or the address alone")
    if address.startswith(_ENDPOINT):
        model, at, url = address.removeprefix(_ENDPOINT).partition("@")
        if not model or not at or not url.startswith(("http://", "https://")):
            raise InputError(
                f"{address}: expected {_ENDPOINT}MODEL@URL, as in {_ENDPOINT}qwen@http://localhost:8000/v1"
            )
        return Contestant(name, address, address, lambda: _endpoint(model, url))
    from ultrafuser_mega.inference.address import Address  # brings torch: seconds

    found = Address.parse(address)
    return Contestant(name, address, f"{address} {_fingerprint(found.path)}", lambda: _local(address, computing))


@contextmanager
def _local(address: str, computing: Computing) -> Iterator[Answering]:
    from ultrafuser_mega.inference.model import opened_model

    with opened_model(address, computing.device, computing.dtype) as opened:
        yield LocalModel(opened, computing.batch_size)


class LocalModel:
    """A model of this machine. Conversations of like length are answered together, the longest first, greedily.

    Args:
        opened: the model, of :func:`ultrafuser_mega.inference.model.opened_model`.
        batch_size: conversations at once.
    """

    def __init__(self, opened: OpenedModel, batch_size: int) -> None:
        from ultrafuser_mega.inference.answer import Answerer
        from ultrafuser_mega.inference.embedded import Serving

        self._opened, self._batch_size = opened, batch_size
        self._answerer = Answerer(opened, Serving(batch_size))

    def harness_model(self, benchmark: str) -> Any:
        """Shares the model's weights."""
        from ultrafuser_mega.evaluation.harness.model import UltraFuserLM

        return UltraFuserLM("", batch_size=self._batch_size, opened=self._opened)

    def answer(self, conversations: Sequence[Messages], max_new_tokens: int) -> Iterator[tuple[int, Reply]]:
        """One that a specialist cannot read (too long, control tokens in its text) gets an empty reply that says so."""
        from ultrafuser_mega.inference.answer import Limits
        from ultrafuser_mega.inference.sampling import Sampling
        from ultrafuser_mega.inference.text_engine import Answer

        prompts = {}
        for number, messages in enumerate(conversations):
            try:
                prompts[number] = self._answerer.encode(list(messages))
            except InputError as error:
                yield number, Reply("", 0, f"{NOT_ASKED}{error}")
        order = sorted(prompts, key=lambda number: -max(map(len, prompts[number].values())))
        sorted_prompts = [prompts[number] for number in order]
        limits = Limits(max_new_tokens)
        for event in self._answerer.stream(sorted_prompts, limits, Sampling()):
            if isinstance(event, tuple) and isinstance(event[1], Answer):
                row, answer = event
                weights = dict(zip(self._answerer.names, answer.mean_weights(), strict=True))
                gate = {name: round(weight, 4) for name, weight in weights.items()} if len(weights) > 1 else {}
                yield order[row], Reply(answer.text, len(answer.tokens), answer.finish_reason, gate)


@contextmanager
def _endpoint(model: str, url: str) -> Iterator[Answering]:
    with open_client(f"{_ENDPOINT}{model}@{url}", url) as client:
        yield Endpoint(client, model)


class Endpoint:
    """A model behind an OpenAI-compatible endpoint, asked for chat completions at temperature 0.

    Args:
        client: of the openai package.
        model: its name there.
        at_once: requests under way.
    """

    def __init__(self, client: Any, model: str, at_once: int = 16) -> None:
        self._client, self._model, self._at_once = client, model, at_once

    def answer(self, conversations: Sequence[Messages], max_new_tokens: int) -> Iterator[tuple[int, Reply]]:
        """Raises InputError where the endpoint cannot be reached or refuses to answer."""
        with ThreadPoolExecutor(self._at_once) as pool:
            futures = {
                pool.submit(self._ask, messages, max_new_tokens): number
                for number, messages in enumerate(conversations)
            }
            try:
                for done in as_completed(futures):
                    yield futures[done], done.result()
            finally:
                for future in futures:
                    future.cancel()

    def harness_model(self, benchmark: str) -> Any:
        """There is none: chat endpoints give no log-likelihoods of texts."""
        raise InputError(
            f"{_ENDPOINT}{self._model}: {benchmark} compares log-likelihoods, which an endpoint does not give; "
            "leave this model out of it"
        )

    def _ask(self, messages: Messages, max_new_tokens: int) -> Reply:
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=list(messages),
                max_tokens=max_new_tokens,
                temperature=0.0,
            )
        except openai.BadRequestError as error:  # as of a prompt that is too long
            return Reply("", 0, f"{NOT_ASKED}{one_line(error)}")
        except openai.OpenAIError as error:
            raise InputError(f"{_ENDPOINT}{self._model}@{self._client.base_url}: {one_line(error)}") from None
        if not completion.choices:
            raise InputError(f"{_ENDPOINT}{self._model}@{self._client.base_url}: answered without a choice")
        choice, usage = completion.choices[0], completion.usage
        finish = {"stop": "eos"}.get(choice.finish_reason, choice.finish_reason)
        return Reply(choice.message.content or "", usage.completion_tokens if usage else 0, finish)


def _fingerprint(folder: Path) -> str:
    """Changes when the folder's weights or configuration do."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".distcp", ".metadata"):
            state = path.stat()
            digest.update(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
