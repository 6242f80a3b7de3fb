"""Rows of a weight of which several tensor-parallel ranks hold a copy.

A shared weight's gradient is the sum of its copies' gradients. Once that is in all of them, the same update keeps the
copies equal to the last bit; only the gradient norm must not count them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class SharedRows:
    """The rows of a parameter from ``first`` on: ``copies`` consecutive tensor-parallel ranks hold the same."""

    first: int
    copies: int


def mark_shared(parameter: nn.Parameter, rows: SharedRows) -> None:
    """Note on ``parameter`` which of its rows are shared."""
    parameter.shared_rows = rows  # type: ignore[attr-defined]


def shared_rows(tensor: Tensor) -> SharedRows | None:
    """What :func:`mark_shared` noted; None for a tensor of which no rows are shared."""
    return getattr(tensor, "shared_rows", None)


@torch.no_grad()
def sum_shared_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Give every copy of shared rows the sum of all copies' gradients, in ``main_grad``; collective over ``group``.

    Args:
        parameters: being trained, the same in number and order on every rank.
        group: the tensor-parallel group.
    """
    for parameter in parameters:
        if (rows := shared_rows(parameter)) is None:
            continue
        mine = _gradient(parameter)[rows.first :]
        # One place for every set of copies, zero but for this rank's: a sum over the group, which is there already.
        sets = mine.new_zeros(group.size() // rows.copies, *mine.shape)
        place = sets[group.rank() // rows.copies]
        place.copy_(mine)
        dist.all_reduce(sets, group=group)
        mine.copy_(place)


def counted_again(parameters: Iterable[nn.Parameter], owned: Callable[[nn.Parameter], slice]) -> Tensor | float:
    """What a sum of squared gradients over all ranks must lose on this one, so that shared rows count once.

    Args:
        parameters: being trained.
        owned: parameter -> which of its flat elements this rank's sum has in it.
    """
    copies: list[float] = []
    parts: list[Tensor] = []
    for parameter in parameters:
        if (rows := shared_rows(parameter)) is None:
            continue
        start, stop, _ = owned(parameter).indices(parameter.numel())
        first = rows.first * (parameter.numel() // parameter.shape[0])
        if max(start, first) < stop:
            parts.append(_gradient(parameter).view(-1)[max(start, first) : stop])
            copies.append(rows.copies)
    if not parts:
        return 0.0
    squares = torch.stack(torch._foreach_norm(parts)).square()
    return (squares * (1 - 1 / squares.new_tensor(copies))).sum()


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Where Megatron's data parallelism adds it up, shaped like the parameter."""
    return parameter.main_grad  # type: ignore[attr-defined]
