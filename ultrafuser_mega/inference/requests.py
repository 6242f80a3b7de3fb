"""What is asked of an engine and what it answers, token by token; every way to answer goes through this protocol.

An engine owns the model. Whoever uses it submits requests at any time, calls ``step`` until it is idle, and reads the
events. A request's tokens do not depend on what else is served beside it: its draws are a function of its seed, its row
and the token's position. Engines know tokens only; ``text_engine`` turns them into text and finds stop strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.sampling import Sampling

Finish = Literal["eos", "length"]
Prompt = Mapping[str, Sequence[int]]  # specialist -> its ids


class Constraint(Protocol):
    """What an answer may be, as a grammar has it; one object for each request, which the engine advances."""

    def mask(self, scores: Tensor) -> None:
        """Set ``scores`` (V,) to -inf, in place, where a token may not come next; one at least must remain."""

    def accept(self, token: int) -> None:
        """``token`` was chosen; what may follow it is asked for next."""


@dataclass(frozen=True)
class Request:
    """An answer that is wanted.

    Attributes:
        id: of the caller's choice; no two requests under way have the same.
        prompt: at least one id for every specialist; lengths may differ.
        sampling: how tokens are chosen.
        max_new_tokens: of the answer, 1 or more; fewer where a specialist's positions end.
        eos: tokens that end the answer; empty: none does.
        row: of the draws (see ``Sampling.seed``), for requests that share a seed.
        top_logprobs: None: no log-probabilities; 0: the chosen token's; k: those of the k likeliest tokens too. They
            are those of the fused distribution, before temperature, penalties, bias and filters.
        prompt_logprobs: those of the prompt's tokens as well; only for a prompt that all specialists read alike.
        constraint: what the answer may be; None: anything.
    """

    id: str
    prompt: Prompt
    sampling: Sampling
    max_new_tokens: int
    eos: frozenset[int]
    row: int = 0
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens}: expected 1 or more")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise InputError(f"top_logprobs {self.top_logprobs}: expected 0 or more")
        for name, ids in self.prompt.items():
            if not len(ids):
                raise InputError(f"the prompt for {name} is empty; give at least one token")
        first = next(iter(self.prompt.values()))
        if self.prompt_logprobs and any(list(ids) != list(first) for ids in self.prompt.values()):
            raise InputError("prompt_logprobs: the specialists' prompts differ; they exist for raw text only")


def refuse_unknown(request: Request, names: Sequence[str], vocabulary: int) -> None:
    """InputError where a request's prompt is for other specialists than ``names``, or names a token beyond them."""
    if set(request.prompt) != set(names):
        raise InputError(f"the prompt is for {', '.join(request.prompt)}; the model has {', '.join(names)}")
    for ids in (*request.prompt.values(), request.sampling.logit_bias):
        for token in {min(ids, default=0), max(ids, default=0)}:
            if not 0 <= token < vocabulary:
                raise InputError(f"token {token}: the vocabulary has 0 to {vocabulary - 1}")


def never_fits(name: str, prompt: int, answer: int, room: int) -> InputError:
    """A prompt and an answer of so many tokens are more than the cache of specialist ``name`` has ``room`` for."""
    return InputError(
        f"a prompt of {prompt} tokens for {name} and an answer of {answer} do not fit into the {room} tokens that "
        "--memory has room for; give more, or ask for a shorter answer"
    )


@dataclass(frozen=True)
class Likely:
    """Of one place: the log-probability of the token there, and (token, log-probability) of the likeliest ones."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class TokenEvent:
    """A request got its next token.

    Attributes:
        id: of the request.
        token: the token; that which ends an answer is shown too.
        weights: of the specialists behind the choice, in the model's order.
        logprob: of the token; None where it was not asked for.
        top: the likeliest tokens with theirs, the likeliest first; None likewise.
        finish: why this is the last token; None: it is not.
    """

    id: str
    token: int
    weights: list[float]
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    finish: Finish | None = None


@dataclass(frozen=True)
class PromptEvent:
    """Comes before a request's first token where ``prompt_logprobs`` was asked for.

    Attributes:
        id: of the request.
        tokens: for every token of the prompt; the first one, which nothing precedes, has None.
    """

    id: str
    tokens: list[Likely | None]


@dataclass(frozen=True)
class FailedEvent:
    """A request ends without an answer, the others go on; no further event names it.

    Attributes:
        id: of the request.
        message: one line, for people.
    """

    id: str
    message: str


Event = TokenEvent | PromptEvent | FailedEvent


@dataclass(frozen=True)
class EngineStats:
    """How an engine is doing; counts are since it began.

    Attributes:
        free: specialist -> tokens that its cache has room for now, what it keeps for prompts to come included.
        total: specialist -> tokens that its cache has room for.
        running: requests that have caches.
        waiting: requests that have none yet.
        drafted: tokens that a specialist proposed for the others to check.
        accepted: those of them that became part of an answer.
        passes: specialist -> forward passes.
        tokens: chosen.
        prompt_tokens: specialist -> tokens of the prompts that were begun.
        prefix_hits: specialist -> those of them that its cache still held.
    """

    free: dict[str, int]
    total: dict[str, int]
    running: int = 0
    waiting: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    prefix_hits: dict[str, int] = field(default_factory=dict)


class Engine(Protocol):
    """Answers requests; used by one thread."""

    def submit(self, request: Request) -> None:
        """Take up a request; it waits until every specialist has room for it.

        Raises:
            InputError: it could never be answered, as a prompt longer than a specialist reads.
        """

    def cancel(self, id: str) -> None:
        """End a request and free its room now; no further event names it. An id that is not under way is ignored."""

    def step(self) -> list[Event]:
        """Do the next piece of work; a request's events come in order. Empty while prompts are read, or when idle.

        Raises:
            BaseException: whatever happened; all requests are gone then, and the engine is idle and can go on.
        """

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or waits."""

    def stats(self) -> EngineStats:
        """How it is doing."""
