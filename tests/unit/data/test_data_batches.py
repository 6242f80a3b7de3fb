"""Microbatches: every row points at the state that predicts its target, for every specialist and every rank."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.data.align import Aligned
from ultrafuser_mega.data.batches import EvaluationBatches, Shard, TrainingBatches
from ultrafuser_mega.data.collate import IGNORED, collate
from ultrafuser_mega.data.store import FORMAT_VERSION, Split, TokenStore
from ultrafuser_mega.data.store_writer import SplitWriter, token_dtype, write_manifest
from ultrafuser_mega.errors import InputError

NAMES = ("text", "code", "math")
PAD = 999
BOS = 1


@st.composite
def conversations(draw: Any) -> Any:
    turns = draw(st.integers(1, 3))
    some = st.lists(st.integers(3, 900), max_size=6)
    prompts = {name: [[BOS, *draw(some)], *(draw(some) for _ in range(turns - 1))] for name in NAMES}
    return Aligned(prompts, [[*draw(some), 2] for _ in range(turns)], False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    written=st.lists(conversations(), min_size=1, max_size=5),
    multiple=st.sampled_from([1, 2, 8]),
    data=st.data(),
)
def test_every_target_stands_one_position_after_its_row_in_every_specialists_tokens(
    written: Any, multiple: Any, data: Any
) -> None:
    fillers = data.draw(st.integers(0, len(written)))
    with TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder) / "split", NAMES, token_dtype(1000))
        writer.add(written)
        writer.close()
        samples = list(Split(Path(folder) / "split", NAMES, token_dtype(1000)))
        class_ids = [place % 3 for place in range(len(samples))]
        full = collate(samples, class_ids, NAMES, PAD, multiple)
        batch = collate(samples, class_ids, NAMES, PAD, multiple, fillers)
    b = len(samples)
    expected = [token for sample in written for turn in sample.responses for token in turn]
    assert full.targets.tolist() == expected
    counting = full.row_sample < b - fillers
    assert torch.equal(batch.targets, torch.where(counting, full.targets, IGNORED))
    assert batch.row_sample.tolist() == [k for k, s in enumerate(written) for turn in s.responses for _ in turn]
    assert batch.row_class.tolist() == [class_ids[k] for k in batch.row_sample.tolist()]
    for name in NAMES:
        tokens, rows = batch.tokens[name], batch.rows[name]
        longest = max(sample.length(name) for sample in samples)
        assert tokens.shape == (b, -(-longest // multiple) * multiple)
        position, k = rows // b, rows % b
        assert torch.equal(k, batch.row_sample)
        assert torch.equal(tokens[k, position + 1], full.targets)
        # the same through the layout that the model uses: states flattened from (S, b)
        next_token = torch.roll(tokens, -1, dims=1).transpose(0, 1).reshape(-1)
        assert torch.equal(next_token[rows], full.targets)
        assert torch.all((tokens == BOS).sum(1) == 1) and torch.all(tokens[:, 0] == BOS)
        for row, sample in zip(tokens, written, strict=True):
            sequence = [t for p, r in zip(sample.prompts[name], sample.responses, strict=True) for t in (*p, *r)]
            assert row.tolist() == sequence + [PAD] * (tokens.shape[1] - len(sequence))


def test_a_rank_lays_out_only_the_specialists_it_runs_and_the_rows_stay_the_same(store: Any) -> None:
    samples = [store.split("text", "train")[place] for place in range(3)]
    every = collate(samples, [0, 0, 0], NAMES, PAD)
    own = collate(samples, [0, 0, 0], ("code",), PAD)
    assert list(own.tokens) == list(own.rows) == ["code"]
    assert torch.equal(own.rows["code"], every.rows["code"]) and torch.equal(own.targets, every.targets)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Three classes; a sample's response tokens are all the same number, unique over the store."""
    folder = tmp_path_factory.mktemp("batches") / "store"
    rng = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    token = 2
    for name, train, heldout in (("text", 13, 7), ("code", 9, 6), ("math", 8, 1)):
        splits[name] = {}
        for split, count in (("train", train), ("heldout", heldout)):
            writer = SplitWriter(folder / name / split, NAMES, token_dtype(1000))
            for _ in range(count):
                token += 1
                prompts = {s: [[BOS] + [2] * int(rng.integers(1, 20))] for s in NAMES}
                writer.add([Aligned(prompts, [[token] * int(rng.integers(1, 30))], False)])
            splits[name][split] = writer.close()
    manifest = {
        "format": FORMAT_VERSION,
        "classes": list(splits),
        "specialists": {name: {} for name in NAMES},
        "vocab_size": 1000,
        "max_length": 64,
        "bos_id": BOS,
        "eos_id": 2,
        "token_dtype": token_dtype(1000).str,
        "splits": splits,
    }
    write_manifest(folder, manifest)
    return TokenStore.open(folder)


def shard(rank: int, dp: int, micro: int) -> Shard:
    return Shard(dp_rank=rank, dp_size=dp, micro_batch_size=micro, specialists=NAMES, pad_id=PAD, pad_to_multiple=4)


@pytest.mark.parametrize(("dp", "micro"), [(1, 12), (1, 2), (2, 3), (3, 2), (4, 3), (6, 2)])
@pytest.mark.parametrize("step", [0, 1, 17])
def test_the_global_batch_is_the_same_however_it_is_spread(store: Any, dp: Any, micro: Any, step: int) -> None:
    work = [TrainingBatches(store, 4, 5, shard(rank, dp, micro)).step(step) for rank in range(dp)]
    reference = TrainingBatches(store, 4, 5, shard(0, 1, 12)).step(step)
    targets = torch.cat([m.targets for one in work for m in one.microbatches])
    assert sorted(targets.tolist()) == sorted(reference.microbatches[0].targets.tolist())
    assert {one.response_tokens for one in work} == {len(targets)} and {one.samples for one in work} == {12}
    assert {len(one.microbatches) for one in work} == {12 // (dp * micro)}
    first_rows = [(m, m.row_sample.diff(prepend=torch.tensor([-1])) > 0) for one in work for m in one.microbatches]
    classes = torch.cat([m.row_class[is_first] for m, is_first in first_rows])
    assert classes.bincount().tolist() == [4, 4, 4]


def test_a_global_batch_that_cannot_be_spread_is_refused_before_the_first_step(store: Any) -> None:
    with pytest.raises(InputError, match="global batch of 12 samples does not divide by micro batch 5 x dp 1"):
        TrainingBatches(store, 4, 5, shard(0, 1, 5))


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 2), (3, 4), (8, 1)])
@pytest.mark.parametrize(("name", "limit"), [("text", None), ("text", 3), ("code", 100), ("math", None)])
def test_every_held_out_sample_counts_once_and_every_rank_does_as_many_microbatches(
    store: Any, dp: Any, micro: Any, name: Any, limit: Any
) -> None:
    ranks = [EvaluationBatches(store, name, shard(rank, dp, micro), limit) for rank in range(dp)]
    batches = [list(rank) for rank in ranks]
    assert {len(one) for one in batches} == {len(ranks[0])}
    assert all(m.tokens["text"].shape[0] == micro for one in batches for m in one)
    counted = torch.cat([m.targets for one in batches for m in one])
    counted = counted[counted != IGNORED]
    heldout = store.split(name, "heldout")
    size = min(limit or 100, len(heldout))
    expected = [token for place in range(size) for token in heldout[place].responses[0].tolist()]
    assert sorted(counted.tolist()) == sorted(expected)
    assert all(rank.response_tokens == len(expected) and rank.samples == size for rank in ranks)
    classes = torch.cat([m.row_class for one in batches for m in one])
    assert set(classes.tolist()) == {store.class_names.index(name)}


def test_held_out_samples_come_in_order(store: Any) -> None:
    one = EvaluationBatches(store, "text", shard(0, 1, 2))
    seen = torch.cat([m.targets for m in one]).unique_consecutive().tolist()
    heldout = store.split("text", "heldout")
    assert seen[:7] == [int(sample.responses[0][0]) for sample in heldout]


def test_a_class_without_held_out_samples_cannot_be_evaluated(store: Any) -> None:
    with pytest.raises(InputError, match='class "text" has no held-out samples to evaluate on'):
        EvaluationBatches(store, "text", shard(0, 1, 1), limit=0)
