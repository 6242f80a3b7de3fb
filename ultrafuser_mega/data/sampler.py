"""Which samples a step trains on, and on which rank: the class-balance sampler (section 2.2, algorithm 1).

Every GLOBAL batch holds the same number of samples of each class. Each class is shuffled anew every
time it has been gone through, and wraps around on its own. The batch of a step is a pure function of
(seed, step): resuming needs no replay, and neither the number of ranks nor the other classes play a
part. ``split_batch`` then spreads a global batch over data-parallel ranks and microbatches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from ultrafuser_mega.errors import InputError

Pick = tuple[str, int]  # class name, index of the sample in the class's split


class ClassBalanceSampler:
    """``sizes``: class name -> number of its training samples; the batch lists classes in this order."""

    def __init__(self, sizes: Mapping[str, int], samples_per_class: int, seed: int) -> None:
        if samples_per_class < 1:
            raise InputError(f"samples_per_class is {samples_per_class}; expected at least 1")
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f'class "{name}" has no training samples; the sampler needs at least 1 of each class')
        self.sizes = dict(sizes)
        self.samples_per_class = samples_per_class
        self.seed = seed
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # the last epoch's order of each class

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step (from 0): ``samples_per_class`` of every class."""
        first = step * self.samples_per_class
        return [
            (name, self._at(name, position))
            for name in self.sizes
            for position in range(first, first + self.samples_per_class)
        ]

    def _at(self, name: str, position: int) -> int:
        epoch, place = divmod(position, self.sizes[name])
        known = self._orders.get(name)
        if known is None or known[0] != epoch:
            known = (epoch, shuffled(self.sizes[name], self.seed, name, epoch))
            self._orders[name] = known
        return int(known[1][place])


def passes(sizes: Mapping[str, int], stages: Mapping[str, tuple[int, int]]) -> list[str]:
    """How often training passes each class's rows, for people: a line per stage and per class too small for a batch.

    ``sizes``: class name -> number of its training samples; ``stages``: title -> (steps, samples_per_class).
    """
    lines = []
    for title, (steps, samples_per_class) in stages.items():
        if not steps:
            continue
        taken = steps * samples_per_class
        often = ", ".join(f"{name} {_often(taken / size)} times" for name, size in sizes.items())
        lines.append(f"{title} takes {steps:,} x {samples_per_class} samples of each class: {often} through its rows")
        for name, size in sizes.items():
            if size < samples_per_class:
                lines.append(
                    f"{title}: {name} has {size} training rows and every batch takes {samples_per_class}: "
                    "a batch holds the same row more than once"
                )
    return lines


def _often(times: float) -> str:
    """Two decimals, or two digits where those would be zeros."""
    return f"{times:.2f}" if times >= 0.1 else f"{times:.1g}"


def shuffled(size: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """(size,) int64: the order of a class in one epoch.

    A stable sort by raw Philox output: numpy promises that raw bits stay the same from version to
    version, which it does not for ``permutation``, and a resumed run must see the same order.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
    return np.argsort(bits, kind="stable")


def split_batch(lengths: Sequence[int] | np.ndarray, micro_batch_size: int, dp_size: int) -> list[list[list[int]]]:
    """Spread a global batch: result[dp rank][microbatch] lists positions of the batch.

    ``lengths`` are the samples' longest sequences. Samples are taken in order of length, longest first
    (memory runs out in the first microbatch or never), so a microbatch holds similar lengths and pads
    little; within the slot that all ranks work on at the same time they are dealt back and forth, so no
    rank waits for another. Every position appears exactly once.

    Raises InputError if the batch is not a multiple of ``micro_batch_size * dp_size``.
    """
    total, slot = len(lengths), micro_batch_size * dp_size
    if micro_batch_size < 1 or dp_size < 1 or total == 0 or total % slot:
        fits = [size for size in range(1, total // max(dp_size, 1) + 1) if total % (size * dp_size) == 0]
        hint = (
            f"with dp {dp_size} a micro batch of {_few(fits)} works"
            if fits
            else f"no micro batch works with dp {dp_size}: make the global batch a multiple of {dp_size}"
        )
        wanted = f"micro batch {micro_batch_size} x dp {dp_size}"
        raise InputError(f"a global batch of {total} samples does not divide by {wanted}; {hint}")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").reshape(-1, micro_batch_size, dp_size)
    order[:, 1::2] = order[:, 1::2, ::-1]
    return [[microbatch.tolist() for microbatch in order[:, :, rank]] for rank in range(dp_size)]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 8 else [*numbers[:4], "...", *numbers[-3:]]))
