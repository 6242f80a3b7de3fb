"""The class-balance sampler and the split of a global batch: pure functions in which no sample is lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.data.sampler import ClassBalanceSampler, passes, shuffled
from ultrafuser_mega.errors import InputError

SIZES = st.dictionaries(st.sampled_from(["text", "code", "math", "law"]), st.integers(1, 40), min_size=1)


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 10**6))
def test_every_global_batch_holds_the_same_number_of_each_class_in_order(
    sizes: Any, n: Any, seed: int, step: Any
) -> None:
    batch = ClassBalanceSampler(sizes, n, seed).batch(step)
    assert [name for name, _ in batch] == [name for name in sizes for _ in range(n)]
    assert all(0 <= index < sizes[name] for name, index in batch)


@settings(deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 12), st.integers(0, 100), st.permutations(range(8)))
def test_a_batch_depends_on_seed_and_step_alone_not_on_what_was_asked_before(
    sizes: Any, n: Any, seed: int, order: Any
) -> None:
    used = ClassBalanceSampler(sizes, n, seed)
    for step in order:
        assert used.batch(step) == ClassBalanceSampler(sizes, n, seed).batch(step)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100), st.integers(1, 3))
def test_each_class_is_gone_through_once_before_it_starts_again(size: Any, n: Any, seed: int, epochs: Any) -> None:
    sampler = ClassBalanceSampler({"text": 7, "code": size}, n, seed)
    steps = -(-size * epochs // n)
    drawn = [index for step in range(steps) for name, index in sampler.batch(step) if name == "code"]
    for epoch in range(epochs):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_classes_do_not_disturb_each_other_and_epochs_and_seeds_differ() -> None:
    alone = ClassBalanceSampler({"text": 100}, 10, 3)
    joined = ClassBalanceSampler({"code": 5, "text": 100}, 10, 3)
    assert alone.batch(7) == joined.batch(7)[10:]
    orders = {tuple(shuffled(100, seed, name, epoch)) for seed in range(3) for name in "ab" for epoch in range(3)}
    assert len(orders) == 18


def test_the_order_is_the_same_in_every_version() -> None:
    """Golden: a resumed run must go on in the order it began with, after any upgrade."""
    assert shuffled(8, 1234, "text", 0).tolist() == [7, 0, 3, 5, 2, 1, 4, 6]


def test_shuffling_is_uniform() -> None:
    counts = Counter(int(shuffled(4, seed, "text", 0)[0]) for seed in range(4000))
    # each place is binomial(4000, 1/4): standard deviation 27; five of them never happen by chance
    assert all(abs(counts[place] - 1000) < 5 * 27.4 for place in range(4))


def test_empty_classes_and_batches_are_refused() -> None:
    with pytest.raises(InputError, match='class "code" has no training samples'):
        ClassBalanceSampler({"text": 3, "code": 0}, 2, 0)
    with pytest.raises(InputError, match="samples_per_class is 0; expected at least 1"):
        ClassBalanceSampler({"text": 3}, 0, 0)


def test_passes_say_how_often_each_class_is_gone_through_and_which_is_too_small_for_a_batch() -> None:
    lines = passes({"text": 800, "code": 3}, {"stage 1": (100, 4), "stage 2": (0, 4)})
    assert lines == [
        "stage 1 takes 100 x 4 samples of each class: text 0.50 times, code 133.33 times through its rows",
        "stage 1: code has 3 training rows and every batch takes 4: a batch holds the same row more than once",
    ]
    sampler = ClassBalanceSampler({"text": 800, "code": 3}, 4, seed=1)
    seen = [pick for step in range(100) for pick in sampler.batch(step)]
    assert len([1 for name, _ in seen if name == "text"]) == 0.5 * 800
    assert len([1 for name, _ in seen if name == "code"]) == 400
