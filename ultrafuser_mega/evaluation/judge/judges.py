"""Who judges: any endpoint that speaks OpenAI's chat protocol, or a file of replies made elsewhere."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.evaluation.judge.ledger import Ledger, Reply, Request
from ultrafuser_mega.openai_client import one_line, open_client

_MALFORMED = 3  # answers of an endpoint that are none
_FORMS = "openai:MODEL, openai:MODEL@URL or file:PATH"


@dataclass
class Spent:
    """What judging took.

    Attributes:
        asked: requests that the endpoint answered in this run.
        kept: requests that the ledger answered.
        input_tokens, output_tokens: of those asked.
        cost: of those asked, in the unit of the prices; None without prices.
    """

    asked: int = 0
    kept: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None


class Judge(ABC):
    """Answers requests, each only once.

    Attributes:
        name: of the judge, as results say it.
        ledger: with what it has said.
        spent: so far.
    """

    def __init__(self, name: str, ledger: Ledger) -> None:
        self.name = name
        self.ledger = ledger
        self.spent = Spent()

    @property
    @abstractmethod
    def model(self) -> str:
        """What requests are named after in the ledger."""

    def replies(self, requests: Sequence[Request]) -> list[str | None]:
        """A reply to every request; None where it has to be made elsewhere.

        Raises:
            InputError: the endpoint refuses, or cannot be reached; what it has answered before is kept.
        """
        wanted = {request.key(self.model): request for request in requests}
        missing = {key: request for key, request in wanted.items() if key not in self.ledger.replies}
        self.spent.kept += len(wanted) - len(missing)
        if missing:
            self._answer(missing)
        found = [self.ledger.replies.get(request.key(self.model)) for request in requests]
        return [reply.text if reply is not None else None for reply in found]

    @abstractmethod
    def _answer(self, missing: dict[str, Request]) -> None:
        """Have these, by key, answered into the ledger, or listed."""


class Endpoint(Judge):
    """A chat endpoint, through OpenAI's client, which tries again, more and more slowly, what is worth it.

    Args:
        model_name: as the endpoint knows it.
        url: its address, as "https://host/v1"; None: OpenAI's.
        ledger: where replies are kept.
        prices: per million tokens read and written; None: cost is not counted.
        parallel: requests under way at a time.
    """

    def __init__(
        self,
        model_name: str,
        url: str | None,
        ledger: Ledger,
        prices: tuple[float, float] | None = None,
        parallel: int = 8,
    ) -> None:
        super().__init__(f"{model_name}@{url}" if url else model_name, ledger)
        self._model_name = model_name
        self._prices = prices
        self._parallel = parallel
        self._client = open_client(f"judge {model_name}", url)

    @property
    def model(self) -> str:
        return self._model_name

    def _answer(self, missing: dict[str, Request]) -> None:
        columns = TextColumn("judge {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = Console(stderr=True)
        if not console.is_terminal:
            console.print(f"judge {self.name}: {len(missing):,} replies to ask", highlight=False, soft_wrap=True)
        with (
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
            ThreadPoolExecutor(self._parallel) as pool,
        ):
            bar = progress.add_task(self._model_name, total=len(missing))
            running = [pool.submit(self._ask, request) for request in missing.values()]
            try:
                for future in as_completed(running):
                    if future.exception() is not None:
                        break
                    progress.advance(bar)
            finally:
                pool.shutdown(cancel_futures=True)
        ended = [future for future in running if not future.cancelled()]
        for future in ended:
            if future.exception() is None:
                self._count(future.result())
        for future in ended:
            future.result()

    def _ask(self, request: Request) -> Reply:
        from openai import OpenAIError

        body = request.as_json(self.model)
        settings = body.pop("settings")
        for _ in range(_MALFORMED):
            try:
                answer = self._client.chat.completions.create(**body, **settings)
            except (OpenAIError, ValueError) as error:
                raise InputError(
                    f"judge {self.name}: {one_line(error)}; replies so far are in {self.ledger.path}"
                ) from None
            if (reply := _reply(answer)) is not None:
                self.ledger.add(request, self.model, reply)
                return reply
        raise InputError(f"judge {self.name}: does not answer as OpenAI's chat protocol says ({str(answer)[:100]!r})")

    def _count(self, reply: Reply) -> None:
        spent = self.spent
        spent.asked += 1
        spent.input_tokens += reply.input_tokens
        spent.output_tokens += reply.output_tokens
        if self._prices is not None:
            read, write = self._prices
            spent.cost = (spent.input_tokens * read + spent.output_tokens * write) / 1e6


class FileJudge(Judge):
    """Replies made elsewhere, in a ledger's form; what it lacks is listed in ``PATH.requests.jsonl``, to be answered.

    Raises:
        InputError: the ledger's lines name more than one model.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(f"file:{ledger.path}", ledger)
        if len(ledger.models) > 1:
            models = ", ".join(sorted(ledger.models))
            raise InputError(f"{ledger.path}: replies of more than one model ({models}); keep one model's in a file")
        self._model = next(iter(ledger.models), "file")
        self.requests = ledger.path.with_name(f"{ledger.path.name}.requests.jsonl")
        self.listed: dict[str, Request] = {}

    @property
    def model(self) -> str:
        return self._model

    def _answer(self, missing: dict[str, Request]) -> None:
        self.listed |= missing
        lines = [
            json.dumps({"key": key, **request.as_json(self.model), "reply": None}, ensure_ascii=False)
            for key, request in self.listed.items()
        ]
        with writing(self.requests):
            self.requests.write_text("\n".join(lines) + "\n")


def open_judge(
    spec: str, ledger: Path, prices: tuple[float, float] | None = None, parallel: int = 8
) -> Endpoint | FileJudge:
    """The judge that ``--judge`` names.

    Args:
        spec: ``openai:MODEL``, ``openai:MODEL@URL`` or ``file:PATH``.
        ledger: where an endpoint's replies are kept.
        prices: per million tokens read and written.
        parallel: requests under way at a time.

    Raises:
        InputError: the form is another, or the judge is not to be had.
    """
    kind, where, url = _parsed(spec)
    if kind == "file":
        return FileJudge(Ledger(Path(where)))
    return Endpoint(where, url or None, Ledger(ledger), prices, parallel)


def check_judge(spec: str, prices: tuple[float, float] | None) -> None:
    """Refuse, before anything is answered, what :func:`open_judge` could not open or count with.

    Raises:
        InputError: the form is another, the file is a folder, or a price is no amount.
    """
    kind, where, _ = _parsed(spec)
    if kind == "file" and Path(where).is_dir():
        raise InputError(f"--judge {spec}: {where} is a folder; name a file, which need not be there yet")
    if prices is not None and not all(0 <= price < math.inf for price in prices):
        raise InputError(f"--judge-price {prices[0]:g} {prices[1]:g}: a price is a number, at least 0")


def _parsed(spec: str) -> tuple[str, str, str]:
    """(kind, model or path, URL or "")."""
    kind, _, rest = spec.partition(":")
    model, _, url = rest.partition("@")
    if kind == "file" and rest:
        return kind, rest, ""
    if kind != "openai" or not model or (url and not url.startswith(("http://", "https://"))):
        raise InputError(f"--judge {spec!r}: write {_FORMS}, with a URL that begins with http:// or https://")
    return kind, model, url


def _reply(answer: Any) -> Reply | None:
    """Of an endpoint's answer, which may be anything; None where it holds none."""
    try:
        text = answer.choices[0].message.content
        usage = answer.usage
    except (AttributeError, IndexError, TypeError):
        return None
    if not isinstance(text, str):
        return None
    counted = [getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(text, *(count if isinstance(count, int) else 0 for count in counted))
