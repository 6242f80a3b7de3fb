"""How many tokens to draft: as many as pay, by how often drafts are accepted and what passes were seen to cost.

A round takes F seconds for every forward pass of a specialist and c for every token that one reads; both are fitted to
the latest rounds. Where reading the weights is what takes the time, c is next to nothing and drafts of a single answer
pay as soon as some are accepted; with many answers, or none that one specialist leads, they soon do not.
"""

from __future__ import annotations

from collections.abc import Sequence

_DECAY = 0.95  # of what is remembered, from round to round
_TOKENS_PER_PASS = 64  # that are taken to cost as much as a pass, until rounds have shown better
_TRUST = 0.05  # of that assumption, beside what rounds show
_RETRY = 32  # rounds without drafts, until one shows whether that is still right


class DraftLength:
    """Chooses the drafts' length from round to round.

    Args:
        most: tokens that are drafted at most.
        adapt: False: always so many.

    Attributes:
        drafted: tokens that were proposed.
        accepted: those of them that became part of an answer.
    """

    def __init__(self, most: int, adapt: bool) -> None:
        self._most, self._adapt = most, adapt
        self.drafted = self.accepted = 0
        self._tried, self._held = 5.0, 4.0  # drafts that were looked at, and those that were accepted; a first guess
        self._sums = [0.0] * 5  # of u u, u r, r r, u t, r t: see _costs
        self._rested = 0

    def choose(self, leaders: Sequence[int], specialists: int) -> int:
        """For a round of rows with these leaders, of so many specialists."""
        if not self._most or not self._adapt:
            return self._most
        batch, groups = len(leaders), len(set(leaders))
        p = min(self._held / self._tried, 0.99)
        of_pass, of_token = self._costs()

        def seconds_per_token(k: int) -> float:
            passes = groups * (k + 1) + specialists - (groups == 1) if k else specialists
            seconds = of_pass * passes + of_token * specialists * batch * (k + 1)
            return seconds / (batch * (1 - p ** (k + 1)) / (1 - p))

        best = min(range(self._most + 1), key=seconds_per_token)
        self._rested = 0 if best else self._rested + 1
        if self._rested == _RETRY:
            self._rested, best = 0, 1
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
        u, r = passes + tokens / _TOKENS_PER_PASS, float(tokens)
        new = u * u, u * r, r * r, u * seconds, r * seconds
        self._sums = [_DECAY * old + more for old, more in zip(self._sums, new, strict=True)]

    def _costs(self) -> tuple[float, float]:
        """Seconds of a pass and of a token; t = f u + d r by least squares, with d drawn towards 0."""
        uu, ur, rr, ut, rt = self._sums
        if not uu:
            return 1.0, 1 / _TOKENS_PER_PASS
        rr *= 1 + _TRUST
        determinant = uu * rr - ur * ur
        f, d = (ut * rr - rt * ur) / determinant, (rt * uu - ut * ur) / determinant
        if f <= 0:
            return 0.0, rt / rr
        return f, max(f / _TOKENS_PER_PASS + d, 0.0)
