"""Host memory that calls of the loss hand on to each other.

A C library gives large pieces of memory back to the system as soon as they are free, and the system zeroes them page by
page when they come again: for a loss's logits that takes as long as a tenth of its products. PyTorch keeps a GPU's
memory itself; a CPU's is kept here.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """At most one piece of host memory, which nobody uses between give() and take().

    Who takes and never gives back keeps the piece, and the next one gets another.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count,) numbers, whatever they are."""
        kept, self._kept = self._kept, None
        if kept is not None and (kept.dtype, kept.device) == (dtype, device) and len(kept) >= count:
            return kept[:count]
        return torch.empty(count, dtype=dtype, device=device)

    def give(self, taken: Tensor) -> None:
        """Back what take() gave; off a CPU it is simply dropped."""
        if taken.device.type == "cpu":
            self._kept = taken if taken._base is None else taken._base
