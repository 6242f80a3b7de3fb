"""What the specialists could do together without a gate: the losses that a fused model must be read against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ultrafuser_mega.runtime.device import to_device


def mixed_and_chosen(alone: Tensor, row_counts: Sequence[int]) -> Tensor:
    """Losses of rows where no gate has a say.

    Args:
        alone: (n, N) every specialist's loss of every row.
        row_counts: rows of each sample, which stand one behind the other.

    Returns:
        (N, 3) float64: of the mean of the specialists' probabilities; of the one with the least loss on the row's
        sample; of the one with the least on the row.
    """
    alone = alone.double()
    mixed = math.log(len(alone)) - torch.logsumexp(-alone, dim=0)
    counts = to_device(torch.tensor(row_counts), alone.device)
    sample = torch.repeat_interleave(counts, output_size=alone.shape[1])  # (N,)
    of_samples = alone.new_zeros((len(alone), len(counts))).index_add_(1, sample, alone)
    best = of_samples.argmin(dim=0)[sample]  # (N,)
    return torch.stack([mixed, alone.gather(0, best[None])[0], alone.amin(dim=0)], dim=1)
