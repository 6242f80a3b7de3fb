"""When a claim holds: rules over seeds, applied to numbers and never by hand.

Every seed is a repetition of everything (for the toy its specialists and data as well), so two models are compared
within a seed. Of the differences d_s over S seeds

    holds                 all d_s have the claimed sign, and Student's 95 % interval of their mean leaves 0 out
    does not hold         the same with the opposite sign
    not decidable         anything else, one seed alone among it

A claim of several comparisons holds where all of them do, and does not hold where one of them does not. "As good as"
is claimed with a margin: the difference is compared with it in place of 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable at this size"
#: Student's t for two-sided 95 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T_LARGE = 2.2  # more than ten: at most this


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean and Student's 95 % interval, infinite for one seed.

    ``reach`` is half of the interval's width.
    """

    mean: float
    reach: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Over at least one value."""
        if len(values) < 2:
            return cls(values[0], math.inf, 1)
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.inf, len(values))
        free = len(values) - 1
        t = _T[free - 1] if free <= len(_T) else _T_LARGE
        return cls(fmean(values), t * stdev(values) / math.sqrt(len(values)), len(values))

    @property
    def low(self) -> float:
        """Of the interval."""
        return self.mean - self.reach

    @property
    def high(self) -> float:
        """Of the interval."""
        return self.mean + self.reach

    def words(self, digits: int = 3) -> str:
        """Of a table's cell; without a reach where there is none."""
        reach = f" ± {self.reach:.{digits}f}" if math.isfinite(self.reach) and self.reach > 0 else ""
        return f"{self.mean:.{digits}f}{reach}"


@dataclass(frozen=True)
class Comparison:
    """Whether ``what`` is so: the sign of a difference by the rule above.

    Attributes:
        what: in words, as in "UltraFuser below BTX".
        differences: one per seed; the claim is that they are below ``margin``.
        margin: 0, or what still counts as equal.
    """

    what: str
    differences: tuple[float, ...]
    margin: float = 0.0

    @property
    def spread(self) -> Spread:
        """Of the differences."""
        return Spread.of(self.differences)

    @property
    def verdict(self) -> str:
        """HOLDS, FAILS or OPEN."""
        spread = self.spread
        if any(not math.isfinite(value) for value in self.differences) or len(self.differences) < 2:
            return OPEN
        if all(d < self.margin for d in self.differences) and spread.high < self.margin:
            return HOLDS
        if all(d > self.margin for d in self.differences) and spread.low > self.margin:
            return FAILS
        return OPEN

    def words(self) -> str:
        """What was found, and why it decides nothing where it does not."""
        found = self.spread
        text = f"{self.what}: {found.mean:+.4f}"
        if found.seeds < 2:
            return f"{text} (one seed has no interval)"
        text += f" ({found.low:+.4f} to {found.high:+.4f})"
        if self.margin:
            text += f" against a margin of {self.margin:+.4f}"
        if self.verdict == OPEN:
            below = sum(d < self.margin for d in self.differences)
            text += f"; {below} of {found.seeds} seeds below {'the margin' if self.margin else '0'}"
        return text


def below(what: str, first: Sequence[float], second: Sequence[float], margin: float = 0.0) -> Comparison:
    """The claim that ``first`` is less than ``second`` + margin, seed by seed: where less is better, is better."""
    if len(first) != len(second):
        raise ValueError(f"{what}: {len(first)} seeds against {len(second)}")
    return Comparison(what, tuple(a - b for a, b in zip(first, second, strict=True)), margin)


@dataclass(frozen=True)
class Claim:
    """One line of the result.

    Attributes:
        place: in the paper, as in "table 1".
        words: what is claimed.
        comparisons: that decide it; none: why is in ``missing``.
        missing: what was not measured, and why; a claim that needs it may fail without it, but not hold.
        paper: whether the paper claims it; else it is what is asked beyond.
    """

    place: str
    words: str
    comparisons: tuple[Comparison, ...]
    missing: str = ""
    paper: bool = True

    @property
    def verdict(self) -> str:
        """HOLDS, FAILS or OPEN."""
        found = {one.verdict for one in self.comparisons}
        if FAILS in found:
            return FAILS
        return HOLDS if found == {HOLDS} and not self.missing else OPEN

    def why(self) -> str:
        """The comparisons that decide it: all where it holds, else those for which it does not."""
        if not self.comparisons:
            return self.missing
        verdict = self.verdict
        # Where something is missing, all that there is may hold, and the claim is open.
        deciding = [one for one in self.comparisons if one.verdict == verdict] or self.comparisons
        parts = [one.words() for one in deciding]
        if len(deciding) < len(self.comparisons):
            parts.append(f"these are {len(deciding)} of {len(self.comparisons)} comparisons")
        return "; ".join([*parts, self.missing] if self.missing else parts)

    def as_json(self) -> dict[str, Any]:
        """For claims.json."""
        return {
            "place": self.place,
            "claim": self.words,
            "of_the_paper": self.paper,
            "verdict": self.verdict,
            "why": self.why(),
            "comparisons": [
                {
                    "what": one.what,
                    "differences": list(one.differences),
                    "margin": one.margin,
                    "verdict": one.verdict,
                }
                for one in self.comparisons
            ],
        }


def counted(claims: Iterable[Claim]) -> str:
    """How many have which verdict, in words."""
    verdicts = [claim.verdict for claim in claims]
    return ", ".join(f"{verdicts.count(one)} {one}" for one in (HOLDS, FAILS, OPEN))
