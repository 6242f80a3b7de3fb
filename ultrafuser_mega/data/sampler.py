"""Which samples a step trains on: the class-balance sampler (section 2.2, algorithm 1).

Every GLOBAL batch holds the same number of samples of each class. Each class is shuffled anew every
time it has been gone through, and wraps around on its own. The batch of a step is a pure function of
(seed, step): resuming needs no replay, and neither the number of ranks nor the other classes play a
part. ``packing.spread`` then places a global batch on data-parallel replicas and in microbatches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
