"""What one data-parallel rank works on: the microbatches of a training step, and of an evaluation.

Both are computed from the store alone. Every rank sees the whole plan, so the number of response tokens
in the global batch (the divisor of the loss) is known without communication, and so is the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ultrafuser_mega.data.collate import MicroBatch, collate
from ultrafuser_mega.data.sampler import ClassBalanceSampler, split_batch
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of the data-parallel work and what it needs of a batch.

    ``specialists``: those whose tokens this rank feeds (all of a store's, or fewer in a disjoint
    layout); ``pad_to_multiple``: see collate.
    """

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    specialists: tuple[str, ...]
    pad_id: int
    pad_to_multiple: int = 1


@dataclass(frozen=True, slots=True)
class StepBatch:
    """``microbatches`` of this rank; the counts are of the GLOBAL batch.

    ``processed_tokens``: of prompts and responses, for every specialist of the store; padding does not count.
    """

    microbatches: list[MicroBatch]
    response_tokens: int
    samples: int
    processed_tokens: int


class TrainingBatches:
    """The training split of every class of a store, balanced; ``step(i)`` is a pure function of i."""

    def __init__(self, store: TokenStore, samples_per_class: int, seed: int, shard: Shard) -> None:
        self.class_names, self.specialists = store.class_names, store.specialists
        self.splits = {name: store.split(name, "train") for name in self.class_names}
        self.sampler = ClassBalanceSampler({n: len(s) for n, s in self.splits.items()}, samples_per_class, seed)
        self.shard = shard
        samples = samples_per_class * len(self.class_names)
        split_batch([1] * samples, shard.micro_batch_size, shard.dp_size)  # refuses before the first step

    def step(self, step: int) -> StepBatch:
        """The work of a step (from 0)."""
        picks = self.sampler.batch(step)
        n = self.sampler.samples_per_class
        indexes = {name: [index for _, index in picks[c * n : (c + 1) * n]] for c, name in enumerate(self.class_names)}
        lengths = np.concatenate([self.splits[name].max_lengths(indexes[name]) for name in self.class_names])
        plan = split_batch(lengths, self.shard.micro_batch_size, self.shard.dp_size)[self.shard.dp_rank]
        return StepBatch(
            [self._collate([picks[position] for position in positions]) for positions in plan],
            sum(int(self.splits[name].response_tokens(indexes[name]).sum()) for name in self.class_names),
            len(picks),
            sum(
                int(self.splits[name].lengths(specialist, indexes[name]).sum())
                for name in self.class_names
                for specialist in self.specialists
            ),
        )

    def _collate(self, picks: Sequence[tuple[str, int]]) -> MicroBatch:
        samples = [self.splits[name][index] for name, index in picks]
        class_ids = [self.class_names.index(name) for name, _ in picks]
        shard = self.shard
        return collate(samples, class_ids, shard.specialists, shard.pad_id, shard.pad_to_multiple)


class EvaluationBatches:
    """The first ``limit`` held-out samples of one class (None: all), spread over the dp ranks.

    All ranks get the same number of microbatches of the same number of samples. Where the samples do
    not divide, the last microbatches are filled up with copies whose targets are IGNORED, so every
    sample counts exactly once. ``response_tokens`` is the number of those that count, over all ranks.
    """

    def __init__(self, store: TokenStore, class_name: str, shard: Shard, limit: int | None = None) -> None:
        self.split = store.split(class_name, "heldout")
        self.class_id = store.class_names.index(class_name)
        self.shard = shard
        self.samples = len(self.split) if limit is None else min(limit, len(self.split))
        if self.samples == 0:
            raise InputError(f'{store.folder}: class "{class_name}" has no held-out samples to evaluate on')
        self.response_tokens = int(self.split.response_tokens(np.arange(self.samples)).sum())

    def __len__(self) -> int:
        """Microbatches per rank."""
        return -(-self.samples // (self.shard.micro_batch_size * self.shard.dp_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        """This rank's microbatches, in the order of the samples."""
        shard = self.shard
        for slot in range(len(self)):
            first = (slot * shard.dp_size + shard.dp_rank) * shard.micro_batch_size
            wanted = range(first, first + shard.micro_batch_size)
            samples = [self.split[min(index, self.samples - 1)] for index in wanted]
            fillers = sum(index >= self.samples for index in wanted)
            class_ids = [self.class_id] * len(samples)
            yield collate(samples, class_ids, shard.specialists, shard.pad_id, shard.pad_to_multiple, fillers)
