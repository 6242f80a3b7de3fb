"""How sure a score is, and whether two models differ: intervals and paired tests over groups of items.

**Intervals** are bootstrap BCa (Efron 1987), 95 %, with groups resampled, since items of one group (the options of a
TruthfulQA question) depend on each other. BCa and not percentiles: accuracies near 0 or 1 (MATH at 4 %) have skewed
distributions, for which BCa's bias and acceleration correct to second order. The acceleration comes from the empirical
influence values, which for a mean over items are exact and cost nothing. Where all groups have one value, resampling
shows no spread. How often groups of another value can be then is what Clopper and Pearson's exact bound says, and the
interval is where the mean can be with so many of them at the least or the greatest value there is.

**Tests** flip the signs of the groups' differences: under the null hypothesis that two models are alike, each group's
difference is as likely to be its opposite. Two-sided, on the sum of differences. For right and wrong answers without
groups this is McNemar's exact test. The distribution is computed exactly, by convolution, where differences are whole
twentieths (as all our scores are), else from random flips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
_AT_ONCE = 4_000_000  # random numbers
_UNIT = 20  # an exact test counts differences in 1 / _UNIT
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one benchmark, summed up by group.

    Attributes:
        groups: names, in the order of the items.
        sums: (G,) of the items' scores.
        counts: (G,) of items.
    """

    groups: tuple[str, ...]
    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float], groups: Sequence[str]) -> Scores:
        """From items' scores and the group of each; at least one."""
        places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
        where = np.array([places[name] for name in groups])
        return cls(tuple(places), np.bincount(where, np.asarray(values, dtype=float)), np.bincount(where))

    @property
    def mean(self) -> float:
        """Over items."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high`` with probability LEVEL."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Whether one model is better than another on the same items.

    Attributes:
        difference: of the means, first less second.
        interval: of the difference.
        p: two-sided; exact or of random flips.
        exact: which.
    """

    difference: float
    interval: Interval
    p: float
    exact: bool


def interval(parts: Sequence[Scores], seed: int = 0, least: float = 0.0) -> Interval:
    """Of the mean of the parts' means: one part is a benchmark's score, several are an average of benchmarks.

    Args:
        parts: resampled each by itself.
        seed: of the draws; the same parts have the same interval.
        least: value of an item: 0 of a score, -1 of a difference of two. The greatest is 1.
    """
    estimate = float(np.mean([part.mean for part in parts]))
    draws = np.mean([_draws(part, np.random.default_rng([seed, place])) for place, part in enumerate(parts)], axis=0)
    if np.ptp(draws) < 1e-12:  # rounding
        return _without_spread(estimate, sum(len(part.groups) for part in parts), least)
    below = (np.count_nonzero(draws < estimate) + 0.5 * np.count_nonzero(draws == estimate)) / DRAWS
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / DRAWS), 1 - 0.5 / DRAWS))
    # Of a mean over items, group g's influence is (sum_g - mean count_g) / items.
    influence = np.concatenate([(part.sums - part.mean * part.counts) / part.counts.sum() for part in parts])
    acceleration = float((influence**3).sum() / (6 * (influence**2).sum() ** 1.5))
    low, high = (_corrected(_NORMAL.inv_cdf(place), bias, acceleration) for place in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(*(float(value) for value in np.quantile(draws, [low, high])))


def paired_test(first: Scores, second: Scores, seed: int = 0) -> PairedTest:
    """Two models on the same items; see :func:`less`."""
    difference = less(first, second)
    units = np.rint(difference.sums * _UNIT)
    exact = bool(np.abs(difference.sums * _UNIT - units).max() < 1e-6)
    p = _exact_p(units.astype(np.int64)) if exact else _random_p(difference.sums, np.random.default_rng(seed))
    return PairedTest(difference.mean, interval([difference], seed, -1.0), p, exact)


def less(first: Scores, second: Scores) -> Scores:
    """The differences of two models on the same items: whose scores have the same groups, in the same order."""
    if first.groups != second.groups or not np.array_equal(first.counts, second.counts):
        raise ValueError("two models are compared on the same items")
    return Scores(first.groups, first.sums - second.sums, first.counts)


@dataclass(frozen=True)
class Recovered:
    """The share of a headroom that a model recovers.

    Attributes:
        share: (model - single) / (oracle - single), of averages over benchmarks.
        interval: percentiles of draws of the same items for all three; None: the headroom may be none at all.
    """

    share: float
    interval: Interval | None


def recovered(
    model: Sequence[Scores], single: Sequence[Scores], oracle: Sequence[Scores], seed: int = 0
) -> Recovered | None:
    """How far ``model`` is on the way from one model to what routing items among several could reach at most.

    Args:
        model: its scores, a part for each benchmark.
        single: of the model where the way begins, on the same items.
        oracle: of the way's end, on the same items.
        seed: of the draws.

    Returns:
        None where the oracle is no better than the single model.
    """
    gained = [less(*pair) for pair in zip(model, single, strict=True)]
    headroom = [less(*pair) for pair in zip(oracle, single, strict=True)]
    whole = sum(part.mean for part in headroom)
    if whole <= 0:
        return None
    draws = np.zeros((2, DRAWS))
    for place, parts in enumerate(zip(gained, headroom, strict=True)):
        draws += _joint_draws(parts, np.random.default_rng([seed, place]))
    share = sum(part.mean for part in gained) / whole
    if np.count_nonzero(draws[1] <= 1e-12) > DRAWS * (1 - LEVEL) / 2:
        return Recovered(share, None)
    held = draws[:, draws[1] > 1e-12]
    low, high = np.quantile(held[0] / held[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Recovered(share, Interval(float(low), float(high)))


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """The p values of several tests, adjusted by Holm (1979): what is below a level there is wrong anywhere among them
    with no more than that probability."""
    adjusted: dict[Any, float] = {}
    most = 0.0
    for place, (name, value) in enumerate(sorted(p.items(), key=lambda one: one[1])):
        most = max(most, min(1.0, (len(p) - place) * value))
        adjusted[name] = most
    return {name: adjusted[name] for name in p}


def _draws(part: Scores, random: np.random.Generator) -> np.ndarray:
    """(DRAWS,) means over resampled groups."""
    return _joint_draws([part], random)[0]


def _joint_draws(parts: Sequence[Scores], random: np.random.Generator) -> np.ndarray:
    """(len(parts), DRAWS) means of parts on the same items, the groups drawn alike for all.

    How often each of the few kinds of groups is drawn is multinomial.
    """
    columns = np.stack([*(part.sums for part in parts), parts[0].counts], axis=1)
    kinds, times = np.unique(columns, axis=0, return_counts=True)  # (K, len(parts) + 1), (K,)
    drawn = random.multinomial(len(columns), times / times.sum(), size=DRAWS)  # (DRAWS, K)
    totals = (drawn @ kinds).T
    return totals[:-1] / totals[-1]


def _without_spread(estimate: float, groups: int, least: float) -> Interval:
    others = 1 - ((1 - LEVEL) / 2) ** (1 / groups)  # share of them, at most
    return Interval(estimate - others * (estimate - least), estimate + others * (1 - estimate))


def _corrected(z: float, bias: float, acceleration: float) -> float:
    """The quantile of the draws that stands for the normal quantile ``z``."""
    shifted = bias + z
    return _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))


def _exact_p(units: np.ndarray) -> float:
    """Share of all sign flips of (G,) whole numbers whose sum is as far from 0 as theirs."""
    observed = abs(int(units.sum()))
    units = np.abs(units[units != 0])
    if observed == 0:
        return 1.0
    step = math.gcd(*units.tolist())
    reach = int(units.sum()) // step
    chance = np.zeros(reach + 1)  # chance[k]: of those whose sign is + adding up to k steps
    chance[0] = 1.0
    for unit in (units // step).tolist():
        chance[unit:] += chance[: reach + 1 - unit].copy()
        chance /= 2
    sums = np.abs(2 * np.arange(reach + 1) - reach)
    return min(1.0, float(chance[sums >= observed // step].sum()))


def _random_p(sums: np.ndarray, random: np.random.Generator) -> float:
    """Of DRAWS random flips, the one observed counted among them."""
    observed = abs(float(sums.sum()))
    rows = max(1, _AT_ONCE // len(sums))
    far = 0
    for begin in range(0, DRAWS, rows):
        signs = random.integers(0, 2, size=(min(rows, DRAWS - begin), len(sums))) * 2 - 1
        far += int(np.count_nonzero(np.abs(signs @ sums) >= observed - 1e-9))
    return (far + 1) / (DRAWS + 1)
