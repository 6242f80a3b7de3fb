"""Intervals and paired tests against small references that share nothing with them."""

from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist, fmean

import numpy as np
import pytest

from ultrafuser_mega.evaluation.statistics import (
    DRAWS,
    Interval,
    Recovered,
    Scores,
    holm,
    interval,
    paired_test,
    recovered,
)

ALONE = [str(place) for place in range(2000)]


def bca_by_enumeration(groups: list[list[float]], level: float = 0.95) -> tuple[float, float]:
    """Efron's BCa from all G^G resamples of the groups, its acceleration from the jackknife."""

    def mean(chosen: list[list[float]]) -> float:
        return fmean(value for group in chosen for value in group)

    normal, estimate = NormalDist(), mean(groups)
    resampled = sorted(mean(list(drawn)) for drawn in itertools.product(groups, repeat=len(groups)))
    less = sum(value < estimate - 1e-12 for value in resampled)
    same = sum(abs(value - estimate) <= 1e-12 for value in resampled)
    bias = normal.inv_cdf((less + same / 2) / len(resampled))
    left_out = [mean(groups[:place] + groups[place + 1 :]) for place in range(len(groups))]
    away = [fmean(left_out) - value for value in left_out]
    acceleration = sum(d**3 for d in away) / (6 * sum(d**2 for d in away) ** 1.5)
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + normal.inv_cdf(tail)
        place = normal.cdf(bias + shifted / (1 - acceleration * shifted))
        ends.append(resampled[min(len(resampled) - 1, int(place * len(resampled)))])
    return ends[0], ends[1]


@pytest.mark.parametrize(
    "groups",
    [
        [[0.13], [0.5], [0.57], [0.91], [0.24], [0.333]],
        [[0.13, 0.2], [0.5, 0.4], [0.57, 0.81], [0.91, 0.22], [0.24, 0.7], [0.333, 0.1]],
    ],
)
def test_an_interval_is_bca_over_groups(groups: list[list[float]]) -> None:
    values = [value for group in groups for value in group]
    names = [str(place) for place, group in enumerate(groups) for _ in group]
    found = interval([Scores.of(values, names)])
    # 6^6 means lie so close that a quantile's sampling error, sqrt(.025 * .975 / DRAWS) = .0016 in probability, moves
    # the ends by less than .02.
    assert (found.low, found.high) == pytest.approx(bca_by_enumeration(groups), abs=0.02)


def test_groups_widen_an_interval_as_their_items_repeat_each_other() -> None:
    generator = random.Random(1)
    values = [float(generator.random() < 0.3) for _ in range(200)]
    alone = interval([Scores.of(values, ALONE[:200])])
    repeated = interval([Scores.of(values * 5, ALONE[:200] * 5)])
    fooled = interval([Scores.of(values * 5, ALONE[:1000])])
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert (fooled.high - fooled.low) * math.sqrt(5) == pytest.approx(alone.high - alone.low, rel=0.1)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """300 draws of 30 groups of 1 to 5 items that share a chance around 0.3: 95 % less 4 standard errors of 1.3 %."""
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(300):
        sizes = generator.integers(1, 6, size=30)
        chances = generator.choice([0.1, 0.5], size=30)
        values = [generator.random() < chance for chance, size in zip(chances, sizes, strict=True) for _ in range(size)]
        names = [name for name, size in zip(ALONE, sizes, strict=False) for _ in range(size)]
        found = interval([Scores.of(values, names)], seed)
        held += found.low <= 0.3 <= found.high
    assert 0.90 <= held / 300 <= 0.999


def test_an_average_of_benchmarks_has_their_variances_over_the_square_of_their_number() -> None:
    generator = random.Random(2)
    parts = [
        Scores.of([float(generator.random() < chance) for _ in range(count)], ALONE[:count])
        for chance, count in ((0.5, 400), (0.2, 100))
    ]
    found = interval(parts)
    spread = math.sqrt(sum(part.mean * (1 - part.mean) / part.counts.sum() for part in parts)) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert found.low < fmean(part.mean for part in parts) < found.high


@pytest.mark.parametrize(
    ("value", "count", "low", "high"),
    [(0.0, 50, 0.0, 0.0711), (1.0, 50, 0.9289, 1.0), (0.0, 1, 0.0, 0.975), (0.5, 4, 0.1988, 0.8012)],
)
def test_scores_that_are_all_alike_get_an_exact_bound(value: float, count: int, low: float, high: float) -> None:
    found = interval([Scores.of([value] * count, ALONE[:count])])
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.5, 0.0)])
def test_a_difference_without_spread_may_be_either_way_and_turns_round_with_the_models(
    first: float, second: float
) -> None:
    one, other = (Scores.of([value] * 4, ALONE[:4]) for value in (first, second))
    found, turned = paired_test(one, other).interval, paired_test(other, one).interval
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))
    others = 1 - 0.025**0.25  # of four groups none is another: so many may be
    middle = first - second
    assert (found.low, found.high) == pytest.approx((middle - others * (middle + 1), middle + others * (1 - middle)))


def test_an_interval_depends_on_nothing_but_its_seed() -> None:
    scores = Scores.of([0.0, 1.0, 1.0, 0.0, 1.0, 0.3], ALONE[:6])
    assert interval([scores], 4) == interval([scores], 4)
    assert isinstance(interval([scores], 5), Interval)


def flipped(differences: list[float]) -> float:
    """Share of the 2^G sign flips that are as far out."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


@pytest.mark.parametrize("unit", [1, 2, 20])
def test_a_paired_test_is_the_share_of_all_flips(unit: int) -> None:
    generator = random.Random(unit)
    for _ in range(20):
        first = [generator.randint(0, unit) / unit for _ in range(24)]
        second = [generator.randint(0, unit) / unit for _ in range(24)]
        groups = [str(place // 3) for place in range(24)]
        found = paired_test(Scores.of(first, groups), Scores.of(second, groups))
        sums = [sum(first[g : g + 3]) - sum(second[g : g + 3]) for g in range(0, 24, 3)]
        assert found.exact and found.p == pytest.approx(flipped(sums), abs=1e-12)
        assert found.difference == pytest.approx(fmean(first) - fmean(second))
        assert found.interval.low <= found.difference <= found.interval.high


@pytest.mark.parametrize(("better", "worse"), [(10, 0), (7, 12), (300, 260), (1, 1), (0, 0)])
def test_right_and_wrong_answers_are_mcnemars_exact_test(better: int, worse: int) -> None:
    same = 500
    first = [1.0] * better + [0.0] * worse + [1.0] * same
    second = [0.0] * better + [1.0] * worse + [1.0] * same
    n, k = better + worse, min(better, worse)
    mcnemar = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    names = ALONE[: len(first)]
    assert paired_test(Scores.of(first, names), Scores.of(second, names)).p == pytest.approx(mcnemar, rel=1e-9)


def test_uneven_scores_are_tested_by_random_flips() -> None:
    generator = random.Random(5)
    first = [generator.random() for _ in range(10)]
    second = [value - 0.2 * generator.random() + 0.07 for value in first]
    found = paired_test(Scores.of(first, ALONE[:10]), Scores.of(second, ALONE[:10]))
    expected = flipped([a - b for a, b in zip(first, second, strict=True)])
    assert not found.exact
    assert found.p == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS) + 1 / DRAWS)


def test_models_with_other_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="on the same items"):
        paired_test(Scores.of([1.0], ["a"]), Scores.of([1.0], ["b"]))


def test_holms_adjustment() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_share_of_a_headroom_is_that_of_the_means_and_its_interval_holds_the_truth() -> None:
    """A single at 0.3, an oracle that is right where it is and at 0.7 elsewhere, a model half way: 200 draws."""
    generator = np.random.default_rng(5)
    held = 0
    for seed in range(200):
        single = (generator.random(300) < 0.3).astype(float)
        oracle = np.maximum(single, generator.random(300) < 4 / 7)
        model = np.where(generator.random(300) < 0.5, single, oracle)
        own, first, best = ([Scores.of(list(values), ALONE[:300])] for values in (model, single, oracle))
        found = recovered(own, first, best, seed)
        assert found is not None and found.interval is not None
        assert found.share == pytest.approx((model.mean() - single.mean()) / (oracle.mean() - single.mean()))
        held += found.interval.low <= 0.5 <= found.interval.high
    assert 0.87 <= held / 200 <= 0.999  # 95 % less 5 standard errors of 1.5 %


def test_without_a_headroom_there_is_no_share_and_with_an_unsure_one_no_interval() -> None:
    same = [Scores.of([0.0, 1.0] * 20, ALONE[:40])]
    one_better = [Scores.of([1.0, *[1.0, 0.0] * 19, 1.0], ALONE[:40])]
    assert recovered(same, same, same) is None
    found = recovered(one_better, same, one_better)
    assert found == Recovered(1.0, None)
