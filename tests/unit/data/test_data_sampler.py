"""The samplers: pure functions of seed and step in which no sample is lost and every class has its share."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.data.sampler import Pick, Sampler, Sampling, make_sampler, passes, shuffled
from ultrafuser_mega.errors import InputError

CLASSES = ["text", "code", "math", "law"]
SIZES = st.dictionaries(st.sampled_from(CLASSES), st.integers(1, 40), min_size=1)
WEIGHTS = st.fixed_dictionaries({name: st.floats(0.01, 100.0) for name in CLASSES})
SAMPLINGS = st.sampled_from(["balanced", "iid", "tokens"]) | WEIGHTS


def sampler_of(sampling: Sampling, sizes: dict[str, int], n: int, seed: int = 0) -> Sampler:
    """Over classes whose samples have 1, 2, 3, .. response tokens each."""
    responses = {name: size * (1 + place) for place, (name, size) in enumerate(sizes.items())}
    return make_sampler(sampling, sizes, responses, n, seed)


def counts(batch: list[Pick]) -> Counter[str]:
    return Counter(name for name, _ in batch)


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 10**6))
def test_every_balanced_batch_holds_the_same_number_of_each_class_in_order(
    sizes: Any, n: Any, seed: int, step: Any
) -> None:
    batch = sampler_of("balanced", sizes, n, seed).batch(step)
    assert [name for name, _ in batch] == [name for name in sizes for _ in range(n)]
    assert all(0 <= index < sizes[name] for name, index in batch)


@settings(deadline=None, derandomize=True)
@given(SAMPLINGS, SIZES, st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 10**6))
def test_every_batch_holds_as_many_samples_class_by_class(
    sampling: Any, sizes: Any, n: Any, seed: int, step: Any
) -> None:
    batch = sampler_of(sampling, sizes, n, seed).batch(step)
    assert len(batch) == n * len(sizes)
    assert [name for name, _ in batch] == [name for name in sizes for _ in range(counts(batch)[name])]
    assert all(0 <= index < sizes[name] for name, index in batch)


@settings(deadline=None, derandomize=True)
@given(SAMPLINGS, SIZES, st.integers(1, 12), st.integers(0, 100), st.permutations(range(8)))
def test_a_batch_depends_on_seed_and_step_alone_not_on_what_was_asked_before(
    sampling: Any, sizes: Any, n: Any, seed: int, order: Any
) -> None:
    used = sampler_of(sampling, sizes, n, seed)
    for step in order:
        assert used.batch(step) == sampler_of(sampling, sizes, n, seed).batch(step)


@settings(deadline=None, derandomize=True)
@given(WEIGHTS | st.just("tokens"), SIZES, st.integers(1, 12), st.integers(0, 10**6))
def test_a_class_has_had_its_share_of_the_samples_at_every_time(sampling: Any, sizes: Any, n: Any, first: Any) -> None:
    sampler, total = sampler_of(sampling, sizes, n), n * len(sizes)
    weights = sampling if isinstance(sampling, dict) else {name: 1 / (1 + k) for k, name in enumerate(sizes)}
    shares = {name: weights[name] / sum(weights[name] for name in sizes) for name in sizes}
    for steps in range(first, first + 5):
        for name, taken in sampler.taken(steps).items():
            assert abs(taken - shares[name] * total * steps) <= 0.5 + shares[name] * len(sizes) / 2 + 1e-6
        gained = {name: taken - sampler.taken(steps)[name] for name, taken in sampler.taken(steps + 1).items()}
        assert counts(sampler.batch(steps)) == Counter({name: int(number) for name, number in gained.items() if number})


@settings(deadline=None, derandomize=True)
@given(WEIGHTS | st.just("balanced"), st.integers(1, 30), st.integers(1, 30), st.integers(0, 100))
def test_each_class_is_gone_through_once_before_it_starts_again(sampling: Any, size: Any, n: Any, seed: int) -> None:
    sampler = sampler_of(sampling, {"text": 7, "code": size}, n, seed)
    drawn = [index for step in range(60) for name, index in sampler.batch(step) if name == "code"]
    for epoch in range(len(drawn) // size):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 30), st.integers(0, 100))
def test_without_balance_all_rows_are_gone_through_once_before_any_comes_again(sizes: Any, n: Any, seed: int) -> None:
    sampler, rows = sampler_of("iid", sizes, n, seed), sum(sizes.values())
    ends = list(accumulate(len(sampler.batch(step)) for step in range(100)))
    for step, end in enumerate(ends):
        if end % rows == 0:
            seen = Counter(pick for before in range(step + 1) for pick in sampler.batch(before))
            assert seen == Counter({(name, k): end // rows for name, size in sizes.items() for k in range(size)})
            break
        if end < rows:
            assert max(Counter(pick for before in range(step + 1) for pick in sampler.batch(before)).values()) == 1


def test_without_balance_a_batch_holds_of_every_class_what_chance_gives_it() -> None:
    sampler = sampler_of("iid", {"text": 8000, "code": 2000}, 50)
    found = [counts(sampler.batch(step))["text"] for step in range(100)]
    # hypergeometric, 100 of 10,000: 80 with a standard deviation of 4
    assert len(set(found)) > 5 and all(abs(number - 80) < 5 * 4 for number in found)
    assert sum(found) == 8000


def test_response_tokens_are_balanced_where_samples_are_not() -> None:
    sampler = make_sampler("tokens", {"text": 100, "code": 50}, {"text": 30_000, "code": 5_000}, 8, 0)
    assert sampler.taken(250) == {"text": 1000, "code": 3000}  # 300 and 100 tokens a sample


def test_a_class_without_a_weight_is_left_out() -> None:
    sampler = sampler_of({"text": 0, "code": 2.0, "math": 1.0}, {"text": 5, "code": 5, "math": 5}, 4)
    assert counts(sampler.batch(3)) == {"code": 8, "math": 4}
    assert sampler.taken(2) == {"text": 0, "code": 16, "math": 8}


def test_balanced_classes_do_not_disturb_each_other_and_epochs_and_seeds_differ() -> None:
    alone = sampler_of("balanced", {"text": 100}, 10, 3)
    joined = sampler_of("balanced", {"code": 5, "text": 100}, 10, 3)
    assert alone.batch(7) == joined.batch(7)[10:]
    orders = {tuple(shuffled(100, seed, name, epoch)) for seed in range(3) for name in "ab" for epoch in range(3)}
    assert len(orders) == 18


def test_the_order_is_the_same_in_every_version() -> None:
    """Golden: a resumed run must go on in the order it began with, after any upgrade."""
    assert shuffled(8, 1234, "text", 0).tolist() == [7, 0, 3, 5, 2, 1, 4, 6]
    sizes = {"text": 8, "code": 3}
    assert sampler_of("balanced", sizes, 2, 1234).batch(1)[:2] == [("text", 3), ("text", 5)]


def test_shuffling_is_uniform() -> None:
    counts = Counter(int(shuffled(4, seed, "text", 0)[0]) for seed in range(4000))
    # each place is binomial(4000, 1/4): standard deviation 27; five of them never happen by chance
    assert all(abs(counts[place] - 1000) < 5 * 27.4 for place in range(4))


def test_empty_classes_and_batches_are_refused() -> None:
    with pytest.raises(InputError, match='class "code" has no training samples'):
        sampler_of("balanced", {"text": 3, "code": 0}, 2)
    with pytest.raises(InputError, match="samples_per_class is 0; expected at least 1"):
        sampler_of("iid", {"text": 3}, 0)


def test_passes_say_how_often_each_class_is_gone_through_and_which_is_too_small_for_a_batch() -> None:
    sampler = sampler_of("balanced", {"text": 800, "code": 3}, 4, seed=1)
    lines = passes({"text": 800, "code": 3}, {"stage 1": (100, sampler), "stage 2": (0, sampler)})
    assert lines == [
        "stage 1 takes 100 x 4 samples of each class: text 0.50 times, code 133.33 times through its rows",
        "stage 1: code has 3 training rows and every batch takes 4: a batch holds the same row more than once",
    ]
    seen = [pick for step in range(100) for pick in sampler.batch(step)]
    assert len([1 for name, _ in seen if name == "text"]) == 0.5 * 800
    assert len([1 for name, _ in seen if name == "code"]) == 400


@pytest.mark.parametrize(
    ("sampling", "line"),
    [
        ("iid", "8 samples of all rows alike: text 0.80 times, code 0.80 times through its rows"),
        ("tokens", "8 samples (text 66.7%, code 33.3%): text 0.67 times, code 1.33 times through its rows"),
        ({"text": 1, "code": 0}, "8 samples (text 100.0%, code 0.0%): text 1.00 times, code 0.00 times"),
        ({"text": 2, "code": 2}, "4 samples of each class: text 0.50 times, code 2.00 times through its rows"),
    ],
)
def test_passes_say_what_a_batch_is_made_of(sampling: Any, line: str) -> None:
    sizes = {"text": 800, "code": 200}
    (found,) = passes(sizes, {"stage 1": (100, sampler_of(sampling, sizes, 4))})
    assert found.startswith(f"stage 1 takes 100 x {line}")


def test_files_of_a_class_give_samples_by_their_weights_and_each_in_its_own_order() -> None:
    files = {"text": [(5, 3.0), (4, 0.0), (7, 1.0)]}
    sampler = make_sampler("balanced", {"text": 16, "code": 3}, {}, 4, 9, files)
    drawn = [row for step in range(25) for name, row in sampler.batch(step) if name == "text"]
    first, second, third = ([row for row in drawn if row in rows] for rows in (range(5), range(5, 9), range(9, 16)))
    assert (len(first), len(second), len(third)) == (75, 0, 25)
    for start in range(0, 75, 5):
        assert sorted(first[start : start + 5]) == list(range(5))  # every pass takes each row once
    assert sorted(third[:7]) == list(range(9, 16))
    assert [row for name, row in sampler.batch(7) if name == "text"] == drawn[28:32]  # whatever was asked before


def test_a_file_that_is_weighed_and_empty_is_refused() -> None:
    with pytest.raises(InputError, match=r'class "text": its training entry 2 has a weight, and no training samples'):
        make_sampler("balanced", {"text": 5}, {}, 4, 0, {"text": [(5, 1.0), (0, 1.0)]})
