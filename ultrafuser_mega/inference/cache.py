"""Keys and values of one specialist for all sequences: one pool of tokens, from which a pass gathers what it looks at.

transformers' models call a cache's ``update`` in every layer and look at what it returns. This one writes the new keys
and values to the places that its sequences own and returns those of each row side by side, ended at the same column:
so rows of any length, which have read any number of tokens, go through a pass together, and masks and positions are
those of a batch that is padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ultrafuser_mega.inference.slots import NOWHERE, Slots

_TABLE_ROWS, _TABLE_STEP = 16, 256


class Held:
    """A sequence in one specialist's cache.

    Attributes:
        ids: its tokens so far.
        read: how many of them have keys and values.
        places: of every token that it may come to.
        row: of the pool's table.
    """

    __slots__ = ("ids", "places", "read", "row")

    def __init__(self, ids: list[int], read: int, places: list[int], row: int) -> None:
        self.ids, self.read, self.places, self.row = ids, read, places, row

    @property
    def left(self) -> int:
        """Tokens that it has not read."""
        return len(self.ids) - self.read

    def cut(self, length: int) -> None:
        """Only the first ``length`` tokens were meant."""
        del self.ids[length:]
        self.read = min(self.read, length)


@dataclass(frozen=True)
class Batch:
    """What one pass reads; b rows of s tokens, of which row r's last counts[r] are meant.

    Attributes:
        ids: (b, s), before those that are meant anything.
        mask: (b, length), 0 in front of a row's first token; None where no row is shorter than others.
    """

    ids: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Gather:
    """Where a pass writes and what it looks at.

    Attributes:
        length: columns, the s new ones included.
        s: new ones.
        looked: (b * length,) places; None: all is new.
        written: (R,) places of the tokens that are meant.
        meant: (R,) which of the b * s they are; None: all.
    """

    length: int
    s: int
    looked: Tensor | None
    written: Tensor
    meant: Tensor | None


class _PooledLayer(DynamicLayer):
    """Of one layer; ``keys`` and ``values`` are (tokens, heads, e)."""

    gather: _Gather

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            part.new_empty(self._tokens, part.shape[1], part.shape[3]) for part in (key_states, value_states)
        )
        self.keys[NOWHERE], self.values[NOWHERE] = 0, 0  # what is masked counts nothing, unless it is no number
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in (b, heads, s, e) each; returns what the rows look at, (b, heads, length, e)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, pool: Tensor, new: Tensor) -> Tensor:
        gather = self.gather
        b, heads, s, e = new.shape
        rows = new.transpose(1, 2).reshape(b * s, heads, e)
        pool.index_copy_(0, gather.written, rows if gather.meant is None else rows.index_select(0, gather.meant))
        if gather.looked is None:
            return new
        return pool.index_select(0, gather.looked).view(b, gather.length, heads, e).transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.gather.length - self.gather.s

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.gather.length, 0


class Pool:
    """One specialist's cache.

    Args:
        layers: of the specialist.
        tokens: that there is room for.
        device: of the specialist.
    """

    def __init__(self, layers: int, tokens: int, device: torch.device) -> None:
        self._tokens = tokens
        self._layers = [_PooledLayer(tokens + 1) for _ in range(layers)]
        self.cache = Cache(layers=[*self._layers])
        self._device = device
        self._table = torch.zeros(_TABLE_ROWS, _TABLE_STEP, dtype=torch.int64, device=device)
        self.clear()

    def clear(self) -> None:
        """Hold nothing, whatever happened before."""
        self.slots = Slots(self._tokens)
        self._rows = list(range(len(self._table) - 1, -1, -1))

    def open(self, ids: Sequence[int], room: int, known: Sequence[int]) -> Held:
        """A sequence's place in the cache, which it fits into.

        Args:
            ids: of the sequence so far, at least one.
            room: how long it may become.
            known: places of its beginning, not all of it, which count as read.
        """
        places = self.slots.take(known, room - len(known))
        if not self._rows or room > self._table.shape[1]:
            self._enlarge_table(room)
        row = self._rows.pop()
        self._table[row, :room] = torch.tensor(places, device=self._device)
        return Held(list(ids), len(known), places, row)

    def keep(self, held: Held) -> None:
        """Let what the sequence has read be found by others."""
        if self.slots.keep(held.places, held.ids[: held.read]):
            self._table[held.row, : len(held.places)] = torch.tensor(held.places, device=self._device)

    def close(self, held: Held) -> None:
        """The sequence ended."""
        self.slots.give(held.places)
        self._rows.append(held.row)

    def begin(self, rows: Sequence[Held], counts: Sequence[int]) -> Batch:
        """Prepare a pass in which each of ``rows`` reads its next ``counts`` tokens, 1 or more."""
        s, length = max(counts), max(held.read + count for held, count in zip(rows, counts, strict=True))
        ids = torch.tensor(
            [
                [0] * (s - count) + held.ids[held.read : held.read + count]
                for held, count in zip(rows, counts, strict=True)
            ]
        )
        numbers = torch.tensor(
            [[held.row, length - held.read - count] for held, count in zip(rows, counts, strict=True)]
        )
        ids, numbers = ids.to(self._device, non_blocking=True), numbers.to(self._device, non_blocking=True)
        columns = torch.arange(length, device=self._device) - numbers[:, 1:]  # (b, length): positions
        looked = self._table[numbers[:, :1], columns.clamp(min=0)]
        even = all(held.read + count == length for held, count in zip(rows, counts, strict=True))
        mask = None if even else columns >= 0
        if mask is not None:
            looked = looked.where(mask, NOWHERE)
        written, meant = looked[:, length - s :].flatten(), None
        if min(counts) < s:
            meant = torch.tensor(
                [place * s + at for place, count in enumerate(counts) for at in range(s - count, s)],
                device=self._device,
            )
            written = written[meant]
        new = not any(held.read for held in rows)
        gather = _Gather(length, s, None if new else looked.flatten(), written, meant)
        for layer in self._layers:
            layer.gather = gather
        return Batch(ids, None if mask is None else mask.long())

    def _enlarge_table(self, room: int) -> None:
        rows, width = self._table.shape
        more = 0 if self._rows else rows
        wider = max(width, -(-room // _TABLE_STEP) * _TABLE_STEP)
        table = self._table.new_zeros(rows + more, wider)
        table[:rows, :width] = self._table
        self._table = table
        self._rows += range(rows + more - 1, rows - 1, -1)


def bytes_per_token(model: Any, name: str) -> int:
    """Bytes of keys and values that specialist ``name`` keeps of a token, in all of its layers."""
    cache: Any = DynamicCache()
    device = next(model.specialists[name].parameters()).device
    model.last_hidden(name, torch.zeros(1, 1, dtype=torch.int64, device=device), None, cache)
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
