"""Where the plan's token counts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.trio import ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.batches import Shard, TrainingBatches
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.planning.microbatch import RESPONSE_SHARE, GlobalBatch, workload_of
from ultrafuser_mega.training.prepare import prepare

NAMES = ("text", "code", "math")


def test_without_data_every_sample_is_as_long_as_it_may_be(trio: Path, tmp_path: Path) -> None:
    config = FuserConfig.model_validate(config_tree(trio, tmp_path, ONE))
    work = workload_of(config, samples_per_class=4)
    assert work.samples == 12
    assert work.tokens == dict.fromkeys(NAMES, 12 * 160)
    assert work.source.startswith("assumed, no data prepared: every sample has data.max_length = 160 tokens")
    # 480 tokens hold three samples of 160.
    assert work.fullest(1).tokens == dict.fromkeys(NAMES, 480)
    assert work.fullest(1).rows == 3 * RESPONSE_SHARE * 160
    assert work.fullest(1).squares == dict.fromkeys(NAMES, 3 * 160**2)


@pytest.mark.parametrize("sampling", ["balanced", "iid", {"text": 5, "code": 1, "math": 0}])
def test_a_prepared_store_gives_its_own_counts(trio: Path, tmp_path: Path, sampling: Any) -> None:
    tree = config_tree(trio, tmp_path, ONE)
    tree["data"]["sampling"] = sampling
    config = FuserConfig.model_validate(tree)
    prepare(config, 400)
    work = workload_of(config, samples_per_class=4)
    assert work.source == f"token counts of {config.store_dir}"
    shard = Shard(0, 2, config.microbatch_tokens, NAMES, dict.fromkeys(NAMES, 1), pad_id=2)
    batches = TrainingBatches(TokenStore.open(config.store_dir), 4, config.seed, shard, sampling)
    for index, step in enumerate(work.steps):
        trained = batches.step(index)
        assert sum(step.tokens.values()) == trained.processed_tokens
        assert step.responses.sum() == trained.response_tokens
        share, imbalance = step.busiest(2, config.microbatch_tokens)
        assert imbalance == pytest.approx(trained.packing.imbalance)
        assert share.count >= len(trained.microbatches)


def test_the_busiest_replica_counts_and_its_fullest_microbatch() -> None:
    batch = GlobalBatch({"text": np.array([10, 8, 6, 5]), "code": np.array([9, 9, 6, 5])}, np.array([3, 3, 2, 2]))
    share, imbalance = batch.busiest(2, 16)
    # Longest 10, 9, 6, 5: 10 + 5 and 9 + 6.
    assert (share.count, imbalance) == (1, 1.0)
    assert share.fullest.tokens == {"text": 15, "code": 14}
    assert share.fullest.rows == 5
    assert share.fullest.squares == {"text": 125, "code": 106}
    alone, _ = batch.busiest(1, 16)
    assert alone.count == 2
    assert alone.mean.tokens == {"text": 29 / 2, "code": 29 / 2}
