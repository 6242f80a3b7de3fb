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
@given(written=st.lists(conversations(), min_size=1, max_size=5), multiple=st.sampled_from([1, 2, 8]))
def test_every_target_stands_one_position_after_its_row_in_every_specialists_tokens(
    written: Any, multiple: Any
) -> None:
    with TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder) / "split", NAMES, token_dtype(1000))
        writer.add(written)
        writer.close()
        samples = list(Split(Path(folder) / "split", NAMES, token_dtype(1000)))
        class_ids = [place % 3 for place in range(len(samples))]
        batch = collate(samples, class_ids, dict.fromkeys(NAMES, multiple), PAD)
        filler = collate(samples, class_ids, dict.fromkeys(NAMES, multiple), PAD, filler_class=3)
    expected = [token for sample in written for turn in sample.responses for token in turn]
    assert batch.targets.tolist() == expected
    assert batch.row_counts == [sum(map(len, sample.responses)) for sample in written]
    assert batch.row_class.tolist() == np.repeat(class_ids, batch.row_counts).tolist()
    assert set(filler.targets.tolist()) == {IGNORED} and set(filler.row_class.tolist()) == {3}
    for name in NAMES:
        packed, rows = batch.tokens[name], batch.rows[name]
        sequences = [
            [t for p, r in zip(sample.prompts[name], sample.responses, strict=True) for t in (*p, *r)]
            for sample in written
        ]
        padding = -sum(map(len, sequences)) % multiple
        assert packed.ids[0].tolist() == [token for ids in sequences for token in ids] + [PAD] * padding
        assert packed.lengths == (*map(len, sequences), *([padding] if padding else []))
        assert packed.starts.tolist() == [0, *np.cumsum(packed.lengths)]
        assert packed.positions.tolist() == [place for length in packed.lengths for place in range(length)]
        assert torch.equal(packed.ids[0, rows + 1], batch.targets)
        sample_of = torch.arange(len(packed.lengths)).repeat_interleave(torch.tensor(packed.lengths))
        assert torch.equal(sample_of[rows], sample_of[rows + 1]), "no target stands in the next sample"
        assert torch.equal(filler.rows[name], rows) and torch.equal(filler.tokens[name].ids, packed.ids)


def test_a_rank_lays_out_only_the_specialists_it_runs_and_the_rows_stay_the_same(store: Any) -> None:
    samples = [store.split("text", "train")[place] for place in range(3)]
    every = collate(samples, [0, 0, 0], dict.fromkeys(NAMES, 1), PAD)
    own = collate(samples, [0, 0, 0], {"code": 1}, PAD)
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


def shard(rank: int, dp: int, microbatch_tokens: int = 64) -> Shard:
    return Shard(rank, dp, microbatch_tokens, specialists=NAMES, multiples=dict.fromkeys(NAMES, 4), pad_id=PAD)


@pytest.mark.parametrize(("dp", "microbatch_tokens"), [(1, 4096), (1, 64), (2, 100), (3, 64), (5, 64), (16, 64)])
@pytest.mark.parametrize("step", [0, 1, 17])
@pytest.mark.parametrize("sampling", ["balanced", "iid", "tokens", {"text": 3, "code": 0, "math": 1}])
def test_the_global_batch_is_the_same_however_it_is_spread(
    store: Any, dp: Any, microbatch_tokens: Any, step: int, sampling: Any
) -> None:
    work = [TrainingBatches(store, 4, 5, shard(rank, dp, microbatch_tokens), sampling).step(step) for rank in range(dp)]
    reference = TrainingBatches(store, 4, 5, shard(0, 1, 4096), sampling).step(step)
    assert len(reference.microbatches) == 1
    microbatches = [m for one in work for m in one.microbatches]
    targets = torch.cat([m.targets for m in microbatches])
    kept = targets != IGNORED
    assert sorted(targets[kept].tolist()) == sorted(reference.microbatches[0].targets.tolist())
    assert {one.response_tokens for one in work} == {int(kept.sum())} and {one.samples for one in work} == {12}
    assert {one.processed_tokens for one in work} == {reference.processed_tokens}
    assert all(sum(m.tokens[name].lengths) <= microbatch_tokens for m in microbatches for name in NAMES)
    classes = [int(rows[0]) for m in microbatches for rows in m.row_class.split(m.row_counts)]
    expected = {"balanced": [4, 4, 4], str({"text": 3, "code": 0, "math": 1}): [9, 0, 3]}
    found = np.bincount(classes, minlength=4)[:3].tolist()
    assert found == expected.get(str(sampling), found) and sum(found) == 12


def test_a_replica_that_gets_no_sample_runs_a_filler_that_counts_nowhere(store: Any) -> None:
    work = [TrainingBatches(store, 4, 5, shard(rank, 16)).step(0) for rank in range(16)]
    idle = [one for one in work if (one.microbatches[0].targets == IGNORED).all()]
    assert len(idle) == 4 and all(len(one.microbatches) == 1 for one in idle)
    assert all((m.row_class == 3).all() for one in idle for m in one.microbatches)


def test_what_a_step_says_of_its_packing(store: Any) -> None:
    """Counted again from the microbatches that all replicas get."""
    work = [TrainingBatches(store, 4, 5, shard(rank, 3)).step(2) for rank in range(3)]
    (packing,) = {one.packing for one in work}
    microbatches = [m for one in work for m in one.microbatches]
    positions = sum(m.tokens[name].ids.numel() for m in microbatches for name in NAMES)
    assert packing.padding == pytest.approx(1 - work[0].processed_tokens / positions)
    longest = [
        sum(
            max(m.tokens[name].lengths[place] for name in NAMES)
            for m in one.microbatches
            for place in range(len(m.row_counts))
        )
        for one in work
    ]
    assert packing.imbalance == pytest.approx(max(longest) / (sum(longest) / 3))
    assert packing.fill == pytest.approx(sum(longest) / (len(microbatches) * 64))


@pytest.mark.parametrize("dp", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("limit", [None, 3])
def test_every_held_out_sample_counts_once(store: Any, dp: Any, limit: Any) -> None:
    ranks = [EvaluationBatches(store, shard(rank, dp), limit) for rank in range(dp)]
    microbatches = [m for rank in ranks for m in rank]
    assert sum(map(len, ranks)) == len(microbatches)
    places = [place for rank in ranks for microbatch in rank.places for place in microbatch]
    wanted = {(n, i) for n in NAMES for i in range(min(limit or 99, len(store.split(n, "heldout"))))}
    assert len(places) == len(wanted) and set(places) == wanted
    rows = [part for m in microbatches for part in m.targets.split(m.row_counts)]
    for (name, index), part in zip(places, rows, strict=True):
        assert part.tolist() == store.split(name, "heldout")[index].responses[0].tolist()
    classes = [int(part[0]) for m in microbatches for part in m.row_class.split(m.row_counts)]
    assert classes == [store.class_names.index(name) for name, _ in places]


def test_a_class_without_held_out_samples_cannot_be_evaluated(store: Any) -> None:
    with pytest.raises(InputError, match='class "text" has no held-out samples to evaluate on'):
        EvaluationBatches(store, shard(0, 1), limit=0)
