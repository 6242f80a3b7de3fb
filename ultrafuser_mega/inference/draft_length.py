"""How many tokens to draft: as many as pay, by how often drafts are accepted and what passes were seen to cost.

A round takes F seconds for every forward pass of a specialist and c for every token that one reads; both are fitted to
the latest rounds, those with drafts and those without weighing the same: rounds that are all alike cannot tell one cost
from the other. Where reading the weights is what takes the time, c is next to nothing and drafts of a single answer pay
as soon as some are accepted; with many answers, or none that one specialist leads, they soon do not. A draft takes a
pass of its own, or a share of one where guesses are right (``guesses``): that share is remembered as well. So that a
mistake is found out, a round now and then is of the other kind: without drafts among those with, and the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence

_DECAY = 0.95  # of what is remembered, from round to round
_TOKENS_PER_PASS = 64  # that are taken to cost as much as a pass, until rounds have shown better
_TRUST = 0.01  # of that assumption, beside what rounds show
_TRIAL = 32  # rounds with drafts, until one without shows whether that is still right
_FIRST = 4  # rounds with drafts before the first trial without
_REST = 256  # rounds without drafts, until one with shows whether costs are still so
_FORGET = 0.98  # of what is remembered of accepted drafts, from round to round without any
_GUESS = 2.0, 1.6  # drafts that were looked at and accepted, where nothing is remembered


class DraftLength:
    """Chooses the drafts' length from round to round.

    Args:
        most: tokens that are drafted at most.
        adapt: False: always so many.
        guesses: whether drafts are guesses, which take no pass of their own.

    Attributes:
        drafted: tokens that were proposed.
        accepted: those of them that became part of an answer.
    """

    def __init__(self, most: int, adapt: bool, guesses: bool = False) -> None:
        self._most, self._adapt = most, adapt
        self.drafted = self.accepted = 0
        self._tried = self._held = 0.0  # drafts that were looked at, and those that were accepted
        self._plain = [0.0] * 6  # of 1, u u, u r, r r, u t, r t: see _costs
        self._with_drafts = [0.0] * 6
        self._passes_per_draft = 0.0 if guesses else 1.0
        self._asked = 0, 0, 0  # drafts, leaders and passes that a round takes whatever is drafted
        self._drafts, self._alike = False, 0  # whether the latest rounds had drafts, and how many in turn are alike

    def choose(self, leaders: Sequence[int], specialists: int) -> int:
        """For a round of rows with these leaders, of so many specialists."""
        if not self._most or not self._adapt:
            return self._most
        batch, groups = len(leaders), len(set(leaders))
        p = min((self._held + _GUESS[1]) / (self._tried + _GUESS[0]), 0.99)
        of_pass, of_token = self._costs()
        least = groups + specialists - (groups == 1)

        def seconds_per_token(k: int) -> float:
            passes = least + groups * k * self._passes_per_draft if k else specialists
            seconds = of_pass * passes + of_token * specialists * batch * (k + 1)
            return seconds / (batch * (1 - p ** (k + 1)) / (1 - p))

        best = min(range(self._most + 1), key=seconds_per_token)
        if best and self._drafts and self._alike >= (_TRIAL if self._plain[0] else _FIRST):
            best = 0
        elif not best and not self._drafts and self._alike >= _REST:
            best = 1
        self._asked = best, groups, least
        return best

    def learn(self, drafted: Sequence[int], accepted: Sequence[int], passes: int, tokens: int, seconds: float) -> None:
        """What a round showed.

        Args:
            drafted: tokens that were proposed for each row.
            accepted: those of them that became part of its answer.
            passes: of all specialists together.
            tokens: that all specialists together read.
            seconds: that it took.
        """
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        # The drafts behind one that was not accepted were not looked at.
        looked_at = sum(min(held + 1, had) for had, held in zip(drafted, accepted, strict=True))
        if looked_at:
            self._tried = _DECAY * self._tried + looked_at
            self._held = _DECAY * self._held + sum(accepted)
        else:
            self._tried, self._held = _FORGET * self._tried, _FORGET * self._held
        k, groups, least = self._asked
        if k and drafted and min(drafted) == k:  # none was cut short
            seen = min(max((passes - least) / (groups * k), 0.0), 1.0)
            self._passes_per_draft += (1 - _DECAY) * (seen - self._passes_per_draft)
        u, r = passes + tokens / _TOKENS_PER_PASS, float(tokens)
        new = 1.0, u * u, u * r, r * r, u * seconds, r * seconds
        drafts = any(drafted)
        self._alike = self._alike + 1 if drafts == self._drafts else 1
        self._drafts = drafts
        kind = self._with_drafts if drafts else self._plain
        kind[:] = [_DECAY * old + more for old, more in zip(kind, new, strict=True)]

    def _costs(self) -> tuple[float, float]:
        """Seconds of a pass and of a token; t = f u + d r by least squares, with d drawn towards 0."""
        kinds = [kind for kind in (self._plain, self._with_drafts) if kind[0]]
        if not kinds:
            return 1.0, 1 / _TOKENS_PER_PASS
        uu, ur, rr, ut, rt = (sum(kind[i] / kind[0] for kind in kinds) for i in range(1, 6))
        rr *= 1 + _TRUST
        determinant = uu * rr - ur * ur
        f, d = (ut * rr - rt * ur) / determinant, (rt * uu - ut * ur) / determinant
        if f <= 0:
            return 0.0, rt / rr
        return f, max(f / _TOKENS_PER_PASS + d, 0.0)
