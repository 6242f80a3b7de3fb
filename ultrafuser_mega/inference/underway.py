"""A request that an engine works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ultrafuser_mega.inference.guesses import Guesses
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
        guesses: its first prompt and its answer, where guesses are made.
        trusted: guesses in a row that were right the last time.
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
    guesses: Guesses = field(default_factory=Guesses)
    trusted: int = 0
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

    def guess(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow the drafts, one more than were right the last time."""
        if most < 1:
            return []
        prompt = next(iter(self.request.prompt.values()))
        if not len(self.guesses):
            self.guesses.add(prompt)
        self.guesses.add(self.answer[len(self.guesses) - len(prompt) :])
        found = self.guesses.behind(self.drafts, min(most, self.trusted + 1))
        end = next((place for place, token in enumerate(found) if token in self.request.eos), len(found))
        return found[:end]

    def place(self, drafts: int, guessed: Sequence[int] = ()) -> Place:
        """Where the token behind the answer, so many of the drafts and what is guessed to follow them is chosen."""
        request = self.request
        first = next(iter(request.prompt.values()))
        constraint = None if request.constraint is None else request.constraint.mask
        answer = [*self.answer, *self.drafts[:drafts], *guessed]
        return Place(request.sampling, request.row, len(answer), first, answer, constraint)

    def settle(self) -> None:
        """Forget drafts; the specialists read the answer's last token next."""
        self.drafts.clear()
        for name, held in self.sequences.items():
            length = len(self.request.prompt[name]) + len(self.answer)
            held.cut(length - 1)
            held.ids.append(self.answer[-1])
