"""What one data-parallel replica works on: the microbatches of a training step, and of an evaluation.

Both are computed from the store alone. Every rank sees the whole plan, so the number of response tokens
in the global batch (the divisor of the loss) is known without communication, and so is the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ultrafuser_mega.data.collate import MicroBatch, collate
from ultrafuser_mega.data.packing import spread
from ultrafuser_mega.data.sampler import Pick, Sampler, Sampling, make_sampler
from ultrafuser_mega.data.store import Split, TokenStore
from ultrafuser_mega.errors import InputError


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of the data-parallel work and what it needs of a batch.

    ``multiples``: for every specialist what its tokens in a microbatch are padded to a multiple of;
    ``specialists``: those whose tokens this rank feeds (all, or fewer in a disjoint layout).
    """

    dp_rank: int
    dp_size: int
    microbatch_tokens: int
    specialists: tuple[str, ...]
    multiples: Mapping[str, int]
    pad_id: int

    @property
    def own_multiples(self) -> dict[str, int]:
        """Those of ``specialists``."""
        return {name: self.multiples[name] for name in self.specialists}


@dataclass(frozen=True, slots=True)
class Packing:
    """How well a global batch was packed, from the longest sequence of each sample but for ``padding``.

    padding    share of all processed positions that are padding or filler
    imbalance  tokens of the busiest replica, in parts of the mean
    fill       tokens of the mean microbatch, in parts of microbatch_tokens
    """

    padding: float
    imbalance: float
    fill: float


@dataclass(frozen=True, slots=True)
class StepBatch:
    """``microbatches`` of this rank; everything else is of the GLOBAL batch of k samples.

    ``lengths``: specialist of the store -> (k,) tokens of each sample; ``responses``: (k,) response tokens among them.
    """

    microbatches: list[MicroBatch]
    lengths: Mapping[str, np.ndarray]
    responses: np.ndarray
    packing: Packing

    @property
    def samples(self) -> int:
        """k."""
        return len(self.responses)

    @property
    def response_tokens(self) -> int:
        """Of all samples."""
        return int(self.responses.sum())

    @property
    def processed_tokens(self) -> int:
        """Of prompts and responses, for every specialist; padding does not count."""
        return sum(int(of_all.sum()) for of_all in self.lengths.values())


class Steps(Protocol):
    """The batches of steps, from wherever they come."""

    def step(self, step: int) -> StepBatch:
        """The work of a step (from 0)."""


class TrainingBatches:
    """The training split of every class of a store; ``step(i)`` is a pure function of i.

    ``samples_per_class``, ``seed``, ``sampling``: which samples a step takes (sampler.py); ``file_weights``: of each
    entry of a class's training files, of the classes that weigh them.
    """

    def __init__(
        self,
        store: TokenStore,
        samples_per_class: int,
        seed: int,
        shard: Shard,
        sampling: Sampling = "balanced",
        file_weights: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.store = store
        self.class_names, self.specialists = store.class_names, store.specialists
        self.splits = {name: store.split(name, "train") for name in self.class_names}
        self.sampler = sampler_of(store, sampling, samples_per_class, seed, file_weights or {})
        self.shard = shard

    def over(self, splits: Mapping[str, Split], sampler: Sampler) -> TrainingBatches:
        """The same of other samples, class by class, drawn by ``sampler``."""
        other = copy(self)
        other.splits, other.sampler = dict(splits), sampler
        return other

    def step(self, step: int) -> StepBatch:
        """The work of a step (from 0)."""
        picks = self.sampler.batch(step)
        lengths = self.lengths(picks)
        longest = np.maximum.reduce(list(lengths.values()))
        plan = spread(longest, self.shard.dp_size, self.shard.microbatch_tokens)
        mine = [
            _microbatch(self.splits, [picks[place] for place in places], self.shard)
            for places in plan[self.shard.dp_rank]
        ]
        # Every replica runs the step's collectives, also one that more replicas than samples leave without work.
        filler = [picks[int(longest.argmin())]]
        return StepBatch(
            mine or [_microbatch(self.splits, filler, self.shard, filler_class=len(self.class_names))],
            lengths,
            np.concatenate([self.splits[name].response_tokens(rows) for name, rows in self._rows(picks).items()]),
            packing_of(plan, lengths, self.shard),
        )

    def lengths(self, picks: Sequence[Pick]) -> dict[str, np.ndarray]:
        """Specialist -> (k,) int64: tokens of the sequences of ``picks``, which stand class by class."""
        rows = self._rows(picks)
        return {
            specialist: np.concatenate([self.splits[name].lengths(specialist, rows[name]) for name in rows])
            for specialist in self.specialists
        }

    def _rows(self, picks: Sequence[Pick]) -> dict[str, list[int]]:
        return {name: [index for other, index in picks if other == name] for name in self.class_names}


def sampler_of(
    store: TokenStore,
    sampling: Sampling,
    samples_per_class: int,
    seed: int,
    file_weights: Mapping[str, Sequence[float]],
) -> Sampler:
    """What draws from a store's training splits; raises as :func:`~ultrafuser_mega.data.sampler.make_sampler`."""
    splits = {name: store.split(name, "train") for name in store.class_names}
    files = {
        name: list(zip(store.entry_samples(name, len(weights)), weights, strict=True))
        for name, weights in file_weights.items()
    }
    sizes = {name: len(split) for name, split in splits.items()}
    responses = {name: split.all_response_tokens for name, split in splits.items()}
    return make_sampler(sampling, sizes, responses, samples_per_class, seed, files)


def _microbatch(
    splits: Mapping[str, Split], picks: Sequence[Pick], shard: Shard, filler_class: int | None = None
) -> MicroBatch:
    samples, names = [splits[name][index] for name, index in picks], list(splits)
    return collate(samples, [names.index(name) for name, _ in picks], shard.own_multiples, shard.pad_id, filler_class)


def packing_of(plan: list[list[list[int]]], lengths: Mapping[str, np.ndarray], shard: Shard) -> Packing:
    """How well ``plan`` packs samples of these ``lengths``; replicas without any take a copy of the shortest."""
    longest = np.maximum.reduce(list(lengths.values()))
    microbatches = [places for replica in plan for places in replica or [[int(longest.argmin())]]]
    processed = sum(
        -(-int(lengths[name][places].sum()) // multiple) * multiple
        for name, multiple in shard.multiples.items()
        for places in microbatches
    )
    real = sum(int(of_all.sum()) for of_all in lengths.values())
    loads = [sum(int(longest[places].sum()) for places in replica) for replica in plan]
    return Packing(
        padding=1 - real / processed,
        imbalance=max(loads) * len(loads) / sum(loads),
        fill=sum(loads) / (len(microbatches) * shard.microbatch_tokens),
    )


class EvaluationBatches:
    """The first ``limit`` held-out samples of every class (None: all), spread over the replicas, each once.

    ``places[i]`` are the samples of microbatch i of this replica: class, index in the class's held-out split.
    """

    def __init__(self, store: TokenStore, shard: Shard, limit: int | None = None) -> None:
        self.splits = {name: store.split(name, "heldout") for name in store.class_names}
        self.shard = shard
        picks: list[Pick] = []
        longest: list[np.ndarray] = []
        for name, split in self.splits.items():
            samples = range(len(split) if limit is None else min(limit, len(split)))
            if not samples:
                raise InputError(f'{store.folder}: class "{name}" has no held-out samples to evaluate on')
            picks += [(name, index) for index in samples]
            longest.append(split.max_lengths(samples))
        plan = spread(np.concatenate(longest), shard.dp_size, shard.microbatch_tokens)[shard.dp_rank]
        self.places = [[picks[position] for position in positions] for positions in plan]

    def __len__(self) -> int:
        """Microbatches of this replica; replicas differ, and one may have none."""
        return len(self.places)

    def __iter__(self) -> Iterator[MicroBatch]:
        """This replica's microbatches."""
        for places in self.places:
            yield _microbatch(self.splits, places, self.shard)
