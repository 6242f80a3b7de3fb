"""Between the engines at a step: hidden states to the leading one, chosen tokens back.

Each row is one answer under way. The engines may hold their rows in different orders, so every row says whose it is:
the number of its request and its position in the answer. Rows that the leading engine does not have, or lacks, are an
error that names the request; nobody waits for what will not come, since how many rows follow is said before them.

All goes through the host, by gloo: a step's rows are few (N x d_j numbers), and specialists may share a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

Row = tuple[int, int]  # number of the request, position in its answer
LEADER = 0
# In messages, which pass through vLLM as text.
LOST = "lost another engine"
ABOUT = "request number"


class OutOfStepError(RuntimeError):
    """Two engines do not work on the same answers."""


def open_group(host: str, port: int, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    """The group of ``size`` engines whose store is at ``host``; waits for all of them."""
    store = PrefixStore("engines", TCPStore(host, port, is_master=False, timeout=timeout))
    return ProcessGroupGloo(store, rank, size, timeout)


class _End:
    """One end of the exchange.

    Args:
        group: of all engines.
        rows: that an engine has at a time, at most.
    """

    def __init__(self, group: ProcessGroupGloo, rows: int) -> None:
        self._group: Any = group  # of whose methods torch's stubs know few
        self._most = rows

    def _send(self, part: Tensor, to: int) -> None:
        try:
            self._group.send([part.contiguous()], to, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(f"{LOST}: {error}") from None

    def _receive(self, part: Tensor, source: int) -> Tensor:
        try:
            self._group.recv([part], source, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(f"{LOST}: {error}") from None
        return part


class Following(_End):
    """The end of an engine that is told its tokens."""

    def tokens(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:  # (R, d) on any device; (R,) int64 on the CPU
        """Send the states of ``rows``; the tokens behind them."""
        header = torch.full((1 + 2 * self._most,), -1, dtype=torch.int64)
        header[0] = len(rows)
        header[1 : 1 + 2 * len(rows)] = torch.tensor(rows, dtype=torch.int64).flatten()
        self._send(header, LEADER)
        self._send(hidden.cpu(), LEADER)
        return self._receive(torch.empty(len(rows), dtype=torch.int64), LEADER)


class Leading(_End):
    """The end of the engine that chooses.

    Args:
        group: of all engines.
        rows: that an engine has at a time, at most.
        widths: of the other engines' hidden states, by their specialists' names, in the order of their ranks from 1.
        dtype: of the hidden states.
    """

    def __init__(self, group: ProcessGroupGloo, rows: int, widths: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__(group, rows)
        self._ranks = {name: rank for rank, name in enumerate(widths, 1)}
        self._widths, self._dtype = dict(widths), dtype
        self._orders: dict[str, Tensor] = {}

    def gather(self, rows: Sequence[Row]) -> dict[str, Tensor]:  # name -> (R, d_j) on the CPU
        """The other engines' states, in the order of ``rows``.

        Raises:
            OutOfStepError: an engine has other rows; names the request by its number.
        """
        places = {row: place for place, row in enumerate(rows)}
        states = {}
        for name, rank in self._ranks.items():
            header = self._receive(torch.empty(1 + 2 * self._most, dtype=torch.int64), rank).tolist()
            theirs = list(zip(header[1::2], header[2::2], strict=True))[: header[0]]
            for missing, by in (
                (set(theirs) - set(rows), "the first specialist's engine"),
                (set(rows) - set(theirs), f"the engine of {name}"),
            ):
                for number, position in missing:
                    raise OutOfStepError(f"{ABOUT} {number}, token {position}: not under way in {by}")
            order = torch.tensor([places[row] for row in theirs])
            came = self._receive(torch.empty(len(rows), self._widths[name], dtype=self._dtype), rank)
            states[name] = torch.empty_like(came).index_copy_(0, order, came)
            self._orders[name] = order
        return states

    def tell(self, tokens: Tensor) -> None:  # (R,) int64 on the CPU, in the order of the rows that were gathered
        """The tokens that were chosen, to all."""
        for name, rank in self._ranks.items():
            self._send(tokens[self._orders[name]], rank)
