"""Numbers of the whole job: averages per class over its response tokens, and the largest of its ranks'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.runtime.groups import RankGroups


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

    def reduce(self, groups: RankGroups) -> dict[str, dict[str, float]]:
        """class -> column -> mean over the job's rows; collective over the job.

        Every rank of a fusion group sees the same rows, so one rank per replica contributes.
        """
        if not groups.is_reporter:
            self._sums.zero_()
        dist.all_reduce(self._sums, group=groups.world)
        sums = self._sums[:-1]
        means = (sums[:, :-1] / sums[:, -1:].clamp(min=1)).tolist()
        return {name: dict(zip(self.columns, row, strict=True)) for name, row in zip(self.classes, means, strict=True)}

    def counts(self) -> dict[str, int]:
        """class -> rows of the job; after :meth:`reduce`."""
        return {name: int(count) for name, count in zip(self.classes, self._sums[:-1, -1].tolist(), strict=True)}


def largest_of_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest there is on any rank, of each value; collective over the job."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [float(value) for value in largest.tolist()]
