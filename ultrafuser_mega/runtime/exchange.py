"""Hidden states of response tokens from their specialist to the whole fusion group, and gradients back.

The vocabulary rows of ALL heads are spread over the fusion group, so every rank of it needs the hidden
states of every specialist for the rows (response tokens) of the microbatch: N x sum(d_j) numbers, instead
of the N x V logits that mixing after the heads would move.

Forward is one all-gather: the tensor-parallel ranks of a specialist's last stage hold the same rows, so
each of them contributes 1/tp of them. Backward is its mirror image, one reduce-scatter in float32: every
rank has a partial gradient (that of its own vocabulary rows), the sums go back to the owning ranks only,
and those complete each other by an all-gather over their tensor-parallel group.

Colocated specialists skip the forward: every rank of the fusion group already holds every row. Specialists that are
frozen get no gradients back: nothing is computed or sent for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.runtime.phases import Phases


@dataclass(frozen=True)
class _Piece:
    """Where one owner's share of one specialist's rows lies in that owner's slot."""

    name: str
    share: int  # which 1/tp of the rows
    shares: int  # tp of the specialist
    width: int  # d_j

    def rows(self, n: int) -> slice:
        size = -(-n // self.shares)
        return slice(min(n, self.share * size), min(n, (self.share + 1) * size))

    def numel(self, n: int) -> int:
        return -(-n // self.shares) * self.width


class HiddenExchange:
    """The exchange of one replica; callable once per microbatch on every rank of the fusion group.

    Args:
        group: the replica's fusion group.
        tensor_group: tensor-parallel group of this rank's specialist(s).
        owners: specialist name -> global ranks of its last stage in tensor-parallel order.
        widths: specialist name -> hidden size d_j.
        phases: of this rank; both directions are of phase "exchange".

    Attributes:
        trained: specialists whose hidden states get gradients, the same on every rank; at first all.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        tensor_group: dist.ProcessGroup,
        owners: Mapping[str, Sequence[int]],
        widths: Mapping[str, int],
        phases: Phases | None = None,
    ) -> None:
        members = dist.get_process_group_ranks(group)
        self.group = group
        self.phases = phases or Phases()
        self.tensor_group = tensor_group
        self.names = list(owners)
        self.trained = frozenset(owners)
        self.widths = dict(widths)
        self.index = group.rank()
        self.pieces: list[list[_Piece]] = [
            [
                _Piece(name, ranks.index(member), len(ranks), widths[name])
                for name, ranks in ((name, list(ranks)) for name, ranks in owners.items())
                if member in ranks
            ]
            for member in members
        ]
        self.local = [piece.name for piece in self.pieces[self.index]]
        self.everyone_has_all = all(len(pieces) == len(self.names) for pieces in self.pieces)

    def __call__(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All specialists' rows on every rank.

        Args:
            local: this rank's specialist(s): name -> (N, d_j), identical on all ranks of a tensor-parallel group.

        Returns:
            name -> (N, d_j) for every specialist. The gradients that flow into them are taken to be this rank's
            partial sums; the gradients that flow out of ``local`` are complete.
        """
        if len(self.pieces) == 1:
            return {name: local[name] for name in self.names}
        with self.phases("exchange"):
            # Of a rank whose own specialists are frozen the backward meets the others' all the same.
            anchor = local[self.local[0]].new_zeros(()).requires_grad_(bool(self.trained))
            gathered = _Exchange.apply(self, anchor, *(local[name] for name in self.local))
        by_name = dict(zip(self.names, gathered, strict=True))
        return {name: states if name in self.trained else states.detach() for name, states in by_name.items()}

    def _slot_numel(self, n: int, names: Collection[str]) -> int:
        """Of the largest share of ``names``, for every rank."""
        return max(sum(piece.numel(n) for piece in pieces if piece.name in names) for pieces in self.pieces)

    def _walk(self, slots: Tensor, n: int, names: Collection[str]) -> Iterator[tuple[Any, Tensor]]:
        """Yield (piece of ``names``, its part of its owner's slot viewed as (rows, d_j)) for slots (F, slot)."""
        for slot, pieces in zip(slots, self.pieces, strict=True):
            offset = 0
            for piece in pieces:
                if piece.name not in names:
                    continue
                rows = piece.rows(n)
                count = rows.stop - rows.start
                yield piece, slot[offset : offset + count * piece.width].view(count, piece.width)
                offset += piece.numel(n)

    def gather(self, local: Mapping[str, Tensor]) -> list[Tensor]:
        """Forward: rows of every specialist from their owners."""
        first = next(iter(local.values()))
        n = first.shape[0]
        mine = first.new_zeros(self._slot_numel(n, self.names))
        offset = 0
        for piece in self.pieces[self.index]:
            part = local[piece.name][piece.rows(n)]
            mine[offset : offset + part.numel()] = part.reshape(-1)
            offset += piece.numel(n)
        slots = first.new_empty((len(self.pieces), mine.numel()))
        dist.all_gather_into_tensor(slots.view(-1), mine, group=self.group)
        result = {name: first.new_empty((n, self.widths[name])) for name in self.names}
        for piece, part in self._walk(slots, n, self.names):
            result[piece.name][piece.rows(n)] = part
        return [result[name] for name in self.names]

    def reduce_to_owners(self, partial: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Backward: sum of all ranks' partial gradients (N, d_j), for this rank's own specialist(s) only.

        None stands for, and is given to, specialists that are not trained; nothing of theirs is sent.
        """
        by_name = {name: part for name, part in zip(self.names, partial, strict=True) if part is not None}
        first = next(iter(by_name.values()))
        n = first.shape[0]
        slots = first.new_zeros((len(self.pieces), self._slot_numel(n, by_name)), dtype=torch.float32)
        for piece, part in self._walk(slots, n, by_name):
            part.copy_(by_name[piece.name][piece.rows(n)])
        mine = slots.new_empty(slots.shape[1])
        dist.reduce_scatter_tensor(mine, slots.view(-1), group=self.group)
        complete: list[Tensor | None] = []
        offset = 0
        for piece in self.pieces[self.index]:
            if piece.name not in by_name:
                complete.append(None)
                continue
            share = mine[offset : offset + piece.numel(n)].to(first.dtype)
            whole = share.new_empty(piece.shares * share.numel())
            dist.all_gather_into_tensor(whole, share, group=self.tensor_group)
            complete.append(whole.view(-1, piece.width)[:n])
            offset += piece.numel(n)
        return complete


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HiddenExchange, anchor: Tensor, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        ctx.set_materialize_grads(False)
        by_name = dict(zip(exchange.local, local, strict=True))
        if exchange.everyone_has_all:
            return tuple(by_name[name].view_as(by_name[name]) for name in exchange.names)
        return tuple(exchange.gather(by_name))

    @staticmethod
    def backward(ctx: Any, *partial: Tensor | None) -> tuple[Tensor | None, ...]:
        with ctx.exchange.phases("exchange"):
            return (None, None, *ctx.exchange.reduce_to_owners(partial))


class SumForward(torch.autograd.Function):
    """All-reduce in forward, identity in backward: for a sum of parts whose gradient every rank already has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
