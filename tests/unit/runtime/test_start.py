"""Ranks that start together have a name of their own, whatever earlier starts left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from ultrafuser_mega.runtime.start import name_of_start

TIMEOUT = timedelta(seconds=30)


def start(store: dist.Store, ranks: int) -> set[str]:
    with ThreadPoolExecutor(ranks) as pool:
        return {*pool.map(lambda rank: name_of_start(store, rank, ranks, TIMEOUT), range(ranks))}


def test_every_start_has_one_name_of_its_own_with_fewer_ranks_and_with_more() -> None:
    store = dist.HashStore()
    names = [start(store, ranks) for ranks in (3, 3, 2, 1, 4)]
    assert [len(name) for name in names] == [1] * 5
    assert len(set.union(*names)) == 5


def test_a_start_that_not_all_ranks_lived_to_see_misleads_nobody() -> None:
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match="1 of 3 ranks did not start"), ThreadPoolExecutor(1) as pool:
        pool.submit(name_of_start, store, 1, 3, timedelta(seconds=1))
        name_of_start(store, 0, 3, timedelta(seconds=0.2))
    assert len(start(store, 3)) == 1
