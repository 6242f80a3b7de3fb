"""Numbers of the whole job: averages per class over its response tokens, and what every rank has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.runtime.groups import RankGroups


def gate_column(specialist: str) -> str:
    """The column of a specialist's gate weights."""
    return f"gate {specialist}"


@dataclass(frozen=True)
class Totals:
    """Of classes that have rows. means: class -> column -> mean over the job's rows; counts: class -> rows.

    ranks: (ranks, k), what each said.
    """

    means: dict[str, dict[str, float]]
    counts: dict[str, int]
    ranks: np.ndarray


class ClassTotals:
    """Sums of row values per class, in float64.

    Args:
        classes: class names; rows carry indexes into them, or one past the last, which counts nowhere (fillers).
        columns: names of the values that come with every row.
        device: where rows are.
    """

    def __init__(self, classes: Sequence[str], columns: Sequence[str], device: torch.device) -> None:
        self.classes = list(classes)
        self.columns = list(columns)
        self._sums = torch.zeros(len(classes) + 1, len(columns) + 1, dtype=torch.float64, device=device)

    def add(self, row_class: Tensor, values: Tensor) -> None:
        """Rows of one microbatch: ``row_class`` (N,), ``values`` (N, len(columns))."""
        with_count = torch.cat([values.double(), values.new_ones((values.shape[0], 1), dtype=torch.float64)], dim=1)
        self._sums.index_add_(0, row_class, with_count)

    def reduce(self, groups: RankGroups, own: Tensor | None = None) -> Totals:
        """What all ranks have together; collective over the job. The host waits for the device once.

        Every rank of a fusion group sees the same rows, so one rank per replica contributes.

        Args:
            groups: of this rank.
            own: (k,) numbers of this rank for all to see; None: none.
        """
        if not groups.is_reporter:
            self._sums.zero_()
        said = self._sums.new_zeros(groups.world.size(), 0 if own is None else len(own))
        if own is not None:
            said[groups.world.rank()] = own
        everything = torch.cat([self._sums[:-1].flatten(), said.flatten()])
        dist.all_reduce(everything, group=groups.world)
        numbers = everything.tolist()
        width = len(self.columns) + 1
        rows = {name: numbers[place * width : (place + 1) * width] for place, name in enumerate(self.classes)}
        rows = {name: row for name, row in rows.items() if row[-1]}
        return Totals(
            means={
                name: {column: value / row[-1] for column, value in zip(self.columns, row, strict=False)}
                for name, row in rows.items()
            },
            counts={name: int(row[-1]) for name, row in rows.items()},
            ranks=np.array(numbers[len(self.classes) * width :]).reshape(said.shape),
        )
