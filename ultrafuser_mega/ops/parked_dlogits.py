"""Head gradients from one product over all rows, although the logits come in row chunks.

dW_j = dz^T x_j sums over all N rows. Summed chunk by chunk it wants every head a second time, in fp32 (6 GB for three
heads of 128256 x 4096). Finished block by block of the vocabulary it wants dz of all rows, which is N V numbers of 16
bits, and the gradients that are to come have K V of them, K = sum d_j. So where N <= K, dz is parked in the memory of
the gradients it will become:

    the first d_1 rows in dW_1, the next d_2 rows in dW_2, ...
    of these, the B columns of a vocabulary block in the block's own B head rows, read as a matrix (d_j, B).

finish() then takes one block after the other: gathers its dz (N, B) into a small workspace, whereupon the block's head
rows are free, and writes dW_j[block] = dz^T x_j there: one fp32 accumulator over all rows, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ultrafuser_mega.ops import gemm

WORKSPACE_BYTES = 64 << 20  # of one vocabulary block's dz


def fits(rows: int, widths: Sequence[int]) -> bool:
    """Whether dz of that many rows finds room in head gradients of these widths."""
    return rows <= sum(widths)


class ParkedDlogits:
    """dz (N, R) on its way to gradients n x (R, d_j), in their memory; see above.

    ``gradients`` are contiguous, of dz's type, and hold nothing but dz until finish() has written them.
    """

    def __init__(self, gradients: Sequence[Tensor], rows: int) -> None:
        self.gradients, self.rows = gradients, rows
        self.columns = gradients[0].shape[0]
        bytes_per_column = rows * gradients[0].element_size()
        self.block_columns = max(1, min(self.columns, WORKSPACE_BYTES // bytes_per_column // 128 * 128 or 1))

    def park(self, rows: slice, dz: Tensor) -> None:
        """Keep dz (C, R) of these rows."""
        for block in self._blocks():
            for place, held in self._places(block):
                first, last = max(rows.start, held.start), min(rows.stop, held.stop)
                if first < last:
                    inside = slice(first - held.start, last - held.start)
                    copy_rows(place[inside], dz[first - rows.start : last - rows.start, block])

    def finish(self, inputs: Sequence[Tensor]) -> None:
        """Write every gradient; inputs: x_j (N, d_j) of dz's type, one per gradient."""
        workspace = inputs[0].new_empty((self.rows, self.block_columns))
        for block in self._blocks():
            dz = workspace[:, : block.stop - block.start]
            for place, held in self._places(block):
                copy_rows(dz[held], place[: held.stop - held.start])
            for gradient, x in zip(self.gradients, inputs, strict=True):
                gemm.accumulate(gradient[block], dz.t(), x, add=False)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.columns, self.block_columns):
            yield slice(start, min(start + self.block_columns, self.columns))

    def _places(self, block: slice) -> Iterator[tuple[Tensor, slice]]:
        """Where the columns of ``block`` wait: a matrix (d_j, B), and which of the N rows it holds."""
        start = 0
        for gradient in self.gradients:
            place = gradient[block].view(-1).view(gradient.shape[1], block.stop - block.start)
            stop = min(start + place.shape[0], self.rows)
            if start < stop:
                yield place, slice(start, stop)
            start = stop


def copy_rows(out: Tensor, source: Tensor) -> None:
    """Between rows that are apart, 8 bytes at a time where both begin and end at multiples of them: PyTorch finds the
    place of every element by itself."""
    each = 8 // out.element_size()
    if each > 1 and all(_divides(each, t) for t in (out, source)):
        out, source = out.view(torch.int64), source.view(torch.int64)
    out.copy_(source)


def _divides(each: int, t: Tensor) -> bool:
    return t.stride(1) == 1 and not any(n % each for n in (t.shape[1], t.stride(0), t.storage_offset()))
