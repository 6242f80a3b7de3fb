"""Which samples a step trains on (section 2.2, algorithm 1): a pure function of (seed, step).

Every GLOBAL batch holds ``samples_per_class`` samples for each class there is. Which, ``data.sampling`` says:

    balanced         as many of every class: the paper's
    {text: 10, ..}   of every class by its weight
    tokens           so that every class gives as many response tokens, by their mean in its rows
    iid              of all rows alike, whatever their class: the paper's run without balance

The first three give every class a share of the samples (``ClassSampler``), the last draws from the union of the classes
(``UnionSampler``). A class may give each of its files a share of its own in turn (``data.classes.NAME.weights``).
What is drawn from is shuffled anew every time it has been gone through, and wraps around. Resuming
needs no replay, and the number of ranks plays no part. ``packing.spread`` then places a global batch on data-parallel
replicas and in microbatches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from ultrafuser_mega.errors import InputError

Name = TypeVar("Name", str, int)
Pick = tuple[str, int]  # class name, index of the sample in the class's split
Sampling = str | Mapping[str, float]  # as the module's docstring has it


class Sampler(Protocol):
    """Global batches, and in words what one is."""

    @property
    def words(self) -> str:
        """For people: how many samples of what."""

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step (from 0), class by class."""

    def taken(self, steps: int) -> dict[str, float]:
        """Class -> its samples in the first ``steps`` batches; where they are drawn alike, their expected number."""


def make_sampler(
    sampling: Sampling,
    sizes: Mapping[str, int],
    responses: Mapping[str, int],
    samples_per_class: int,
    seed: int,
    files: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> Sampler:
    """The sampler that ``sampling`` asks for.

    Args:
        sampling: one of the module's words, or class -> weight, at least 0.
        sizes: class name -> number of its training samples; batches list classes in this order.
        responses: class name -> response tokens of all its training samples.
        samples_per_class: of a global batch, times the number of classes.
        seed: of the order.
        files: class -> (samples, weight) of each of its files in the order of its samples, where those are weighed.

    Raises:
        InputError: a class has no samples, or a batch would have none, or a file that is weighed has none.
    """
    if samples_per_class < 1:
        raise InputError(f"samples_per_class is {samples_per_class}; expected at least 1")
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f'class "{name}" has no training samples; the sampler needs at least 1 of each class')
    batch_size = samples_per_class * len(sizes)
    if sampling == "iid":
        return UnionSampler(sizes, batch_size, seed)
    if isinstance(sampling, Mapping):
        weights = {name: sampling[name] for name in sizes}
    elif sampling == "tokens":
        weights = {name: size / responses[name] for name, size in sizes.items()}
    else:
        weights = dict.fromkeys(sizes, 1.0)
    return ClassSampler(sizes, weights, batch_size, seed, files or {})


class ClassSampler:
    """Every class has a share of the samples, and goes through its rows on its own.

    The k-th sample of a class (from 0) is due at (k + 1/2) / share, and batches take the samples as they are due
    (Sainte-Lague's method): after any H of them each of C classes has had share x H, but for 1/2 + C share / 2 at most.
    Equal shares make every batch hold as many of every class. A class whose files are weighed takes its own samples of
    them in the same way.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
        files: Mapping[str, Sequence[tuple[int, float]]],
    ) -> None:
        whole = math.fsum(weights.values())
        self.batch_size = batch_size
        self.shares = {name: weights[name] / whole for name in sizes if weights[name] > 0}
        self._rows: dict[str, _Rows] = {
            name: _Weighed(files[name], seed, name) if name in files else _Shuffled(sizes[name], seed, name)
            for name in self.shares
        }
        self._classes = list(sizes)

    @property
    def words(self) -> str:
        if len(self.shares) == len(self._classes) and len(set(self.shares.values())) == 1:
            return f"{self.batch_size // len(self.shares)} samples of each class"
        parts = ", ".join(f"{name} {self.shares.get(name, 0.0):.1%}" for name in self._classes)
        return f"{self.batch_size} samples ({parts})"

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step (from 0), class by class."""
        before, after = (self._first(steps * self.batch_size) for steps in (step, step + 1))
        return [
            (name, rows.at(position))
            for name, rows in self._rows.items()
            for position in range(before[name], after[name])
        ]

    def taken(self, steps: int) -> dict[str, float]:
        """Class -> its samples in the first ``steps`` batches."""
        return dict.fromkeys(self._classes, 0.0) | {**self._first(steps * self.batch_size)}

    def _first(self, total: int) -> dict[str, int]:
        """Class -> how many of the first ``total`` samples are its own."""
        return _due(self.shares, total)


class UnionSampler:
    """All rows alike, whatever their class."""

    def __init__(self, sizes: Mapping[str, int], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size = dict(sizes), batch_size
        self._names = list(sizes)
        self._ends = np.cumsum(list(sizes.values()))
        self._rows = _Shuffled(int(self._ends[-1]), seed, "*")  # which names no class

    @property
    def words(self) -> str:
        return f"{self.batch_size} samples of all rows alike"

    def batch(self, step: int) -> list[Pick]:
        """The global batch of a step (from 0), class by class."""
        first = step * self.batch_size
        rows = [self._rows.at(position) for position in range(first, first + self.batch_size)]
        classes = np.searchsorted(self._ends, rows, side="right")  # (k,)
        picks = [
            (self._names[at], row - int(self._ends[at]) + self.sizes[self._names[at]])
            for at, row in zip(classes.tolist(), rows, strict=True)
        ]
        return [picks[place] for place in np.argsort(classes, kind="stable")]

    def taken(self, steps: int) -> dict[str, float]:
        """Class -> the expected number of its samples in the first ``steps`` batches."""
        return {name: steps * self.batch_size * size / int(self._ends[-1]) for name, size in self.sizes.items()}


def _due(shares: Mapping[Name, float], total: int) -> dict[Name, int]:
    """How many of the first ``total`` are each one's, by Sainte-Lague; ``shares`` are above 0 and add up to 1."""
    # By the bound of ClassSampler, less one: none of these is due behind the last of them.
    slack = len(shares) / 2
    found = {name: max(0, math.floor(share * (total - slack)) - 1) for name, share in shares.items()}
    for _ in range(total - sum(found.values())):
        found[min(found, key=lambda name: (found[name] + 0.5) / shares[name])] += 1
    return found


class _Rows(Protocol):
    def at(self, position: int) -> int:
        """The row that a class gives as its ``position``-th sample (from 0)."""


class _Weighed:
    """The rows of a class whose files have shares, each file in its own order."""

    def __init__(self, files: Sequence[tuple[int, float]], seed: int, name: str) -> None:
        whole = math.fsum(weight for _, weight in files)
        for at, (size, weight) in enumerate(files):
            if weight and not size:
                raise InputError(f'class "{name}": its training entry {at + 1} has a weight, and no training samples')
        self._shares = {at: weight / whole for at, (_, weight) in enumerate(files) if weight}
        self._starts = [0, *np.cumsum([size for size, _ in files]).tolist()]
        self._files = {at: _Shuffled(files[at][0], seed, f"{name}/{at}") for at in self._shares}

    def at(self, position: int) -> int:
        before, after = _due(self._shares, position), _due(self._shares, position + 1)
        at = next(at for at in after if after[at] > before[at])
        return int(self._starts[at]) + self._files[at].at(before[at])


class _Shuffled:
    """Rows in an order that is another one each time they have been gone through."""

    def __init__(self, size: int, seed: int, name: str) -> None:
        self._size, self._seed, self._name = size, seed, name
        self._epoch, self._order = -1, np.empty(0, np.int64)  # the last that was asked for

    def at(self, position: int) -> int:
        epoch, place = divmod(position, self._size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self._size, self._seed, self._name, epoch)
        return int(self._order[place])


def passes(sizes: Mapping[str, int], stages: Mapping[str, tuple[int, Sampler]]) -> list[str]:
    """How often training passes each class's rows, for people: a line per stage and per class too small for a batch.

    ``sizes``: class name -> number of its training samples; ``stages``: title -> (steps, what draws them).
    """
    lines = []
    for title, (steps, sampler) in stages.items():
        if not steps:
            continue
        taken = sampler.taken(steps)
        often = ", ".join(f"{name} {_often(taken[name] / size)} times" for name, size in sizes.items())
        lines.append(f"{title} takes {steps:,} x {sampler.words}: {often} through its rows")
        for name, size in sizes.items():
            if size < taken[name] / steps:
                lines.append(
                    f"{title}: {name} has {size} training rows and every batch takes {math.ceil(taken[name] / steps)}: "
                    "a batch holds the same row more than once"
                )
    return lines


def _often(times: float) -> str:
    """Two decimals, or two digits where those would be zeros."""
    return f"{times:.2f}" if times >= 0.1 or not times else f"{times:.1g}"


def shuffled(size: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """(size,) int64: the order of a class in one epoch.

    A stable sort by raw Philox output: numpy promises that raw bits stay the same from version to
    version, which it does not for ``permutation``, and a resumed run must see the same order.
    """
    key = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
    return np.argsort(bits, kind="stable")
