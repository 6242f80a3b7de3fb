"""What the engine and the process of one specialist say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ultrafuser_mega.inference.requests import Likely


@dataclass(frozen=True)
class Job:
    """What a process is to run.

    Attributes:
        folder: with the config.json of its model (see ``part``).
        dtype: of weights and activations, in vLLM's words.
        devices: indices of its GPUs, or None for each tensor parallel rank on the CPU.
        rows: answers under way at a time, at most.
        positions: of the longest sequence.
        step_tokens: that a step reads, at most.
        cache_bytes: for its cache, on every device; None: what ``gpu_share`` leaves.
        gpu_share: of a GPU's memory that it may use, weights included.
        threads: of a process on the CPU.
    """

    folder: str
    dtype: str
    devices: list[int | None]
    rows: int
    positions: int
    step_tokens: int
    cache_bytes: int | None
    gpu_share: float
    threads: int


@dataclass(frozen=True)
class Up:
    """The process has loaded its model.

    Attributes:
        blocks: of its cache that requests can have.
        block: tokens of one.
    """

    blocks: int
    block: int


@dataclass(frozen=True)
class Fresh:
    """A request that begins.

    Attributes:
        number: of the request.
        prompt: its ids for this specialist.
        longest: tokens of the answer.
        eos: tokens that end it.
        extra: what choosing needs (see ``models``).
    """

    number: int
    prompt: list[int]
    longest: int
    eos: list[int]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step is to be done.

    Attributes:
        ended: numbers of requests that end without an answer.
        fresh: requests that begin.
        masks: request -> the tokens that may come next, where not all may.
    """

    ended: list[int]
    fresh: list[Fresh]
    masks: dict[int, bytes]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one request.

    Attributes:
        number: of the request.
        token: for its answer.
        finite: whether it was chosen by numbers.
        weights: of the specialists.
        likely: log-probabilities, where they are wanted.
    """

    number: int
    token: int
    finite: bool
    weights: list[float]
    likely: Likely | None


@dataclass(frozen=True)
class Stepped:
    """A step is done.

    Attributes:
        tokens: request -> its next token.
        cached: request that began -> tokens of its prompt that the cache still held.
        choices: of the process that chooses.
    """

    tokens: dict[int, int]
    cached: dict[int, int]
    choices: list[Choice] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """The process ends.

    Attributes:
        message: why, in one line.
        told: whether the message is for people as it stands.
        lost: whether it is for want of another process.
        number: of the request that it is about, where it is about one.
    """

    message: str
    told: bool = False
    lost: bool = False
    number: int | None = None
