"""The work that a run's data give its ranks: token counts of global batches, and how they pack into microbatches.

Counts come from the run's token store where one is prepared; else every sample is taken to be as long as
data.max_length allows, which is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.batches import sampler_of
from ultrafuser_mega.data.packing import spread
from ultrafuser_mega.data.store import MANIFEST, TokenStore

RESPONSE_SHARE = 0.75  # of a sample's tokens, where no store says it
_STEPS = 4  # of the store: global batches that are looked at


@dataclass(frozen=True)
class Microbatch:
    """What of a microbatch decides its cost.

    Attributes:
        tokens: specialist -> T_j, padding among them.
        rows: N, response tokens.
        squares: specialist -> sum of s^2 over its sequences of s tokens.
    """

    tokens: Mapping[str, float]
    rows: float
    squares: Mapping[str, float]

    @classmethod
    def alike(cls, names: Sequence[str], tokens: int, rows: int, sequence: int | None = None) -> Microbatch:
        """``tokens`` for every specialist, in sequences of ``sequence`` tokens (default: in one)."""
        length = sequence or tokens
        return cls(dict.fromkeys(names, tokens), rows, dict.fromkeys(names, tokens * length))


@dataclass(frozen=True)
class Share:
    """A replica's part of a step: its microbatches, on the average and the one with most tokens."""

    count: int
    mean: Microbatch
    fullest: Microbatch


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step; specialist -> (k,) tokens of each sample, and (k,) its response tokens."""

    lengths: Mapping[str, np.ndarray]
    responses: np.ndarray

    @cached_property
    def _longest(self) -> np.ndarray:
        return np.maximum.reduce(list(self.lengths.values()))

    @property
    def tokens(self) -> dict[str, int]:
        """Specialist -> its tokens in the step."""
        return {name: int(lengths.sum()) for name, lengths in self.lengths.items()}

    @property
    def squares(self) -> dict[str, int]:
        """Specialist -> sum of s^2 over its sequences in the step."""
        return {name: int((lengths.astype(np.int64) ** 2).sum()) for name, lengths in self.lengths.items()}

    @cached_property
    def _busiest(self) -> dict[tuple[int, int], tuple[Share, float]]:
        return {}

    def busiest(self, replicas: int, microbatch_tokens: int) -> tuple[Share, float]:
        """The part of the replica with most tokens, and those in parts of the mean replica's."""
        key = (replicas, microbatch_tokens)
        if key not in self._busiest:  # many layouts ask for the same
            self._busiest[key] = self._packed(replicas, microbatch_tokens)
        return self._busiest[key]

    def _packed(self, replicas: int, microbatch_tokens: int) -> tuple[Share, float]:
        plan = spread(self._longest, replicas, microbatch_tokens)
        loads = [sum(int(self._longest[places].sum()) for places in replica) for replica in plan]
        mine = plan[int(np.argmax(loads))]
        everything = [place for places in mine for place in places]
        count = len(mine)
        whole = self._microbatch(everything)
        mean = Microbatch(
            {name: tokens / count for name, tokens in whole.tokens.items()},
            whole.rows / count,
            {name: pairs / count for name, pairs in whole.squares.items()},
        )
        return Share(count, mean, self._microbatch(mine[0])), max(loads) * replicas / sum(loads)

    def _microbatch(self, places: Sequence[int]) -> Microbatch:
        chosen = {name: lengths[list(places)].astype(np.int64) for name, lengths in self.lengths.items()}
        return Microbatch(
            {name: int(lengths.sum()) for name, lengths in chosen.items()},
            int(self.responses[list(places)].sum()),
            {name: int((lengths**2).sum()) for name, lengths in chosen.items()},
        )


@dataclass(frozen=True)
class Workload:
    """Some steps of a stage, and in words where their token counts come from."""

    steps: tuple[GlobalBatch, ...]
    microbatch_tokens: int
    source: str

    @property
    def samples(self) -> int:
        """Of a step."""
        return len(self.steps[0].responses)

    @property
    def tokens(self) -> dict[str, float]:
        """Specialist -> its tokens in the mean step."""
        return {name: float(np.mean([step.tokens[name] for step in self.steps])) for name in self.steps[0].lengths}

    def fullest(self, replicas: int) -> Microbatch:
        """The microbatch with most tokens that any step holds."""
        shares = [step.busiest(replicas, self.microbatch_tokens)[0] for step in self.steps]
        return max((share.fullest for share in shares), key=lambda one: sum(one.tokens.values()))

    def most_microbatches(self, replicas: int) -> int:
        """The most that a replica has in a step."""
        return max(step.busiest(replicas, self.microbatch_tokens)[0].count for step in self.steps)


def workload_of(config: FuserConfig, samples_per_class: int) -> Workload:
    """The steps of a stage with that batch.

    Raises:
        InputError: there is a token store that cannot be read.
    """
    if (store := prepared_store(config)) is not None:
        return _of_store(store, samples_per_class, config)
    samples = samples_per_class * len(config.data.classes)
    length = config.data.max_length
    lengths = np.full(samples, length)
    batch = GlobalBatch(dict.fromkeys(config.specialists, lengths), (lengths * RESPONSE_SHARE).astype(np.int64))
    source = (
        f"assumed, no data prepared: every sample has data.max_length = {length} tokens, {RESPONSE_SHARE:.0%} response"
    )
    return Workload((batch,), config.microbatch_tokens, source)


def prepared_store(config: FuserConfig) -> TokenStore | None:
    """The run's token store, if its data have been prepared for these specialists and classes.

    Raises:
        InputError: there is one that cannot be read.
    """
    if not (config.store_dir / MANIFEST).is_file():
        return None
    store = TokenStore.open(config.store_dir, verify=False)
    same = set(store.specialists) == set(config.specialists) and set(store.class_names) == set(config.data.classes)
    return store if same else None


def _of_store(store: TokenStore, samples_per_class: int, config: FuserConfig) -> Workload:
    splits = {name: store.split(name, "train") for name in store.class_names}
    sampler = sampler_of(store, config.data.sampling, samples_per_class, config.seed, config.data.file_weights)
    steps = []
    for step in range(_STEPS):
        picks = sampler.batch(step)
        rows = {name: [index for other, index in picks if other == name] for name in splits}
        lengths = {
            one: np.concatenate([splits[name].lengths(one, rows[name]) for name in rows]) for one in config.specialists
        }
        steps.append(GlobalBatch(lengths, np.concatenate([splits[name].response_tokens(rows[name]) for name in rows])))
    return Workload(tuple(steps), config.microbatch_tokens, f"token counts of {store.folder}")
