"""A request that an engine works on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ultrafuser_mega.inference.lanes import Sequences
from ultrafuser_mega.inference.mixing import Evidence
from ultrafuser_mega.inference.requests import Likely, Request
from ultrafuser_mega.inference.sampling import Place


@dataclass(eq=False)
class Underway:
    """One request with what is known of its answer.

    Attributes:
        request: as it came.
        sequences: what every specialist holds of it: the prompt, the answer and, while they are checked, drafts.
        longest: tokens that its answer may have.
        answer: tokens so far.
        drafts: tokens that a specialist proposes to follow them.
        leader: place of the specialist with the largest weight behind the answer's last token.
        end: what is known where the prompt ends, of one row.
        states: specialist -> (1, d_j) its last hidden state where its prompt ends, as soon as it has read it.
        likelihoods: specialist -> sum of the log-likelihoods of its prompt's tokens, for rules that read text.
        prompt: log-probabilities of the prompt's tokens so far, where they are wanted.
    """

    request: Request
    sequences: Sequences
    longest: int
    answer: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    leader: int = 0
    end: Evidence | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    likelihoods: dict[str, Tensor] = field(default_factory=dict)
    prompt: list[Likely | None] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens that the answer may still get."""
        return self.longest - len(self.answer)

    @property
    def unsettled(self) -> int:
        """Tokens behind which the next is asked for: the answer's last and the drafts that others read."""
        name, held = next(iter(self.sequences.items()))
        return len(held.ids) - len(self.request.prompt[name]) - len(self.answer) + 1

    def draft(self, token: int) -> None:
        """``token`` may follow; the specialists read it, unless nothing follows it."""
        self.drafts.append(token)
        if token not in self.request.eos:
            for held in self.sequences.values():
                held.ids.append(token)

    def place(self, drafts: int) -> Place:
        """Where the token behind the answer and so many of the drafts is chosen."""
        request = self.request
        first = next(iter(request.prompt.values()))
        constraint = None if request.constraint is None else request.constraint.mask
        position = len(self.answer) + drafts
        return Place(request.sampling, request.row, position, first, [*self.answer, *self.drafts[:drafts]], constraint)

    def settle(self) -> None:
        """Forget drafts; the specialists read the answer's last token next."""
        self.drafts.clear()
        for name, held in self.sequences.items():
            length = len(self.request.prompt[name]) + len(self.answer)
            held.cut(length - 1)
            held.ids.append(self.answer[-1])
