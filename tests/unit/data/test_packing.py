"""Packing by tokens: every sample once, replicas even, microbatches full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.data.packing import padded_lengths, positions_of, spread, starts_of
from ultrafuser_mega.errors import InputError

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS, replicas=st.integers(1, 70), microbatch_tokens=st.integers(100, 400))
def test_every_sample_lies_in_one_microbatch_that_holds_it(lengths: Any, replicas: Any, microbatch_tokens: Any) -> None:
    plan = spread(lengths, replicas, microbatch_tokens)
    assert len(plan) == replicas
    assert sorted(place for replica in plan for bin in replica for place in bin) == list(range(len(lengths)))
    for replica in plan:
        loads = [sum(lengths[place] for place in bin) for bin in replica]
        assert all(0 < load <= microbatch_tokens for load in loads)
        assert loads == sorted(loads, reverse=True)
    assert plan == spread(np.array(lengths), replicas, microbatch_tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS, replicas=st.integers(1, 70))
def test_no_replica_has_more_than_the_mean_and_a_sample(lengths: Any, replicas: Any) -> None:
    """Graham's bound: the replica that took a sample last was the lightest before, so not above the others' mean."""
    loads = [sum(lengths[place] for bin in replica for place in bin) for replica in spread(lengths, replicas, 100)]
    assert max(loads) <= sum(lengths) / replicas + (1 - 1 / replicas) * max(lengths) + 1e-9


def test_replicas_of_many_short_samples_are_even() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 96).clip(20, 800).astype(int)
    for replicas in (2, 4, 8):
        loads = [sum(lengths[place] for bin in replica for place in bin) for replica in spread(lengths, replicas, 2048)]
        assert max(loads) <= 1.06 * np.mean(loads)


def test_a_replica_takes_no_more_microbatches_than_its_tokens_need() -> None:
    (replica,) = spread([60, 50, 50, 40], replicas=1, microbatch_tokens=100)
    assert [sorted(bin) for bin in replica] == [[0, 3], [1, 2]]


def test_a_sample_longer_than_a_microbatch_is_refused() -> None:
    with pytest.raises(InputError, match="microbatch_tokens: 100 cannot hold a sample of 101 tokens; make it at least"):
        spread([5, 101], 1, 100)


def test_padding_is_a_sequence_of_its_own() -> None:
    assert padded_lengths([3, 2], 4) == (3, 2, 3) and padded_lengths([3, 1], 4) == (3, 1)
    assert starts_of((3, 2, 3)).tolist() == [0, 3, 5, 8]
    assert positions_of((3, 2, 3)).tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
