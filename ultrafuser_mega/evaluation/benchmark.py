"""What a benchmark is to the rest of the evaluation: items to ask a model, and what its replies are worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Domain = Literal["text", "code", "math"]

#: A sample's rule where a judge was asked and none of its replies says anything.
NO_VERDICT = "no verdict"
#: How a reply's finish begins where the model could not be asked; the reason stands behind.
NOT_ASKED = "not asked: "


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within its benchmark, and the same in every run.
        turns: what the user says, turn by turn; each but the first is said when the one before was answered.
        reference: what the score is taken against; anything that JSON holds.
        group: items of one group are drawn together when an interval is computed, since they depend on each other (the
            options of a TruthfulQA question); "": the item stands alone.
        category: a part of the benchmark that is reported by itself (MT-Bench); "": none.
    """

    id: str
    turns: tuple[str, ...]
    reference: Any
    group: str = ""
    category: str = ""


@dataclass(frozen=True)
class Score:
    """What a reply is worth.

    Attributes:
        value: 0 to 1; None where a judge has to say.
        extracted: the answer that was found in the reply; None: none.
        rule: by which rule it was found, or why the reply is wrong; "": nothing to say.
    """

    value: float | None
    extracted: str | None = None
    rule: str = ""


class Benchmark(ABC):
    """A set of items with one metric.

    Attributes:
        name: of the benchmark, on the command line and in files.
        title: in tables.
        domain: what its score is averaged with.
        metric: what the score is called.
        source: the file in the folder of ``--data``.
        origin: where that file is published, for whoever lacks it.
        max_new_tokens: of a reply.
        judged: whether a judge scores it.
        scale: what a score is multiplied with in tables: 100, per cent; 10, a rating.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    domain: ClassVar[Domain]
    metric: ClassVar[str]
    source: ClassVar[str]
    origin: ClassVar[str]
    max_new_tokens: ClassVar[int] = 512
    judged: ClassVar[bool] = False
    runs_programs: ClassVar[bool] = False
    scale: ClassVar[float] = 100.0

    @abstractmethod
    def items(self, data: Path) -> list[Item]:
        """All items, in the file's order.

        Args:
            data: the folder with ``source``.

        Raises:
            InputError: the file is missing, with where to get it, or is not what it should be, with file and line.
        """

    @abstractmethod
    def score(self, item: Item, replies: Sequence[str]) -> Score:
        """The worth of ``replies``, one to each turn of ``item``."""


@dataclass(frozen=True)
class Sample:
    """One item as one model answered it: a line of samples.jsonl.

    Attributes:
        model: its name in tables.
        benchmark: the name.
        item: id.
        group: of the item; its id where it stands alone.
        category: of the item.
        turns: as asked, before any template.
        replies: as given.
        score: None until a judge has said, or where the judge says nothing (the rule is NO_VERDICT then).
        extracted, rule: see :class:`Score`.
        tokens: of all replies together.
        finish: per reply, why it ended ("eos", "stop", "length").
        gate: specialist -> average weight over the tokens of the replies; empty where there is no gate.
        seconds: since the batch began; batches run many items at once.
    """

    model: str
    benchmark: str
    item: str
    group: str
    category: str
    turns: tuple[str, ...]
    replies: tuple[str, ...]
    score: float | None
    extracted: str | None
    rule: str
    tokens: int
    finish: tuple[str, ...]
    gate: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
