"""Numbers of the whole job: averages per class over its response tokens, and the largest of its ranks'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.runtime.groups import RankGroups


@dataclass(frozen=True)
class Totals:
    """means: class -> column -> mean over the job's rows; counts: class -> rows; largest: as asked for."""

    means: dict[str, dict[str, float]]
    counts: dict[str, int]
    largest: list[float]


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

    def reduce(self, groups: RankGroups, largest: Tensor | None = None) -> Totals:
        """What all ranks have together; collective over the job. The host waits for the device once.

        Every rank of a fusion group sees the same rows, so one rank per replica contributes.

        Args:
            groups: of this rank.
            largest: (k,) numbers of this rank of which the largest on any rank is wanted.
        """
        if not groups.is_reporter:
            self._sums.zero_()
        dist.all_reduce(self._sums, group=groups.world)
        largest = self._sums.new_zeros(0) if largest is None else largest.to(self._sums.dtype)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.world)
        numbers = torch.cat([self._sums[:-1].flatten(), largest]).tolist()
        width = len(self.columns) + 1
        rows = [numbers[place * width : (place + 1) * width] for place in range(len(self.classes))]
        return Totals(
            means={
                name: {column: value / max(row[-1], 1.0) for column, value in zip(self.columns, row, strict=False)}
                for name, row in zip(self.classes, rows, strict=True)
            },
            counts={name: int(row[-1]) for name, row in zip(self.classes, rows, strict=True)},
            largest=numbers[len(self.classes) * width :],
        )
