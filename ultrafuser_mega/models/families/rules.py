"""How one parameter of Megatron-core's decoder layer is made of Hugging Face tensors, and these of it.

Every rule works in both directions: ``shard`` reads a tensor-parallel shard from Hugging Face tensors by slice,
``restore`` gives one Hugging Face tensor from the whole (unsharded) parameter. Both rotate halves, so no rule
permutes within a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ReadHF = Callable[..., Tensor]  # (name, rows=slice, columns=slice | None) of one layer's tensor
ReadWhole = Callable[[slice], Tensor]  # rows of one layer's whole parameter

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer, in elements."""

    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int

    def kv_heads_of_rank(self, tp: int) -> int:
        """Key/value heads on each tensor-parallel rank: one at least."""
        return max(self.kv_heads // tp, 1)

    def kv_copies(self, tp: int) -> int:
        """Consecutive tensor-parallel ranks that hold a copy of the same key/value head."""
        return max(tp // self.kv_heads, 1)


class Rule(Protocol):
    """One parameter of the layer.

    Attributes:
        parameter: its name in Megatron-core's local decoder layer.
        stored: its name in a checkpoint's sharded state (where norms carry their fused names).
    """

    @property
    def parameter(self) -> str: ...

    @property
    def stored(self) -> str: ...

    def shapes(self, a: LayerSizes) -> dict[str, Shape]:
        """Hugging Face name within the layer -> shape."""

    def whole_shape(self, a: LayerSizes) -> Shape:
        """Shape of the unsharded parameter."""

    def shard(self, a: LayerSizes, read: ReadHF, rank: int, tp: int) -> Tensor:
        """Shard ``rank`` of ``tp``."""

    def restore(self, a: LayerSizes, name: str, whole: ReadWhole) -> Tensor:
        """The Hugging Face tensor ``name``, one of ``shapes``."""


@dataclass(frozen=True)
class Norm:
    """A norm's weight, whole on every rank. ``size`` is the name of its length in :class:`LayerSizes`."""

    parameter: str
    hf: str
    stored: str
    size: str = "hidden_size"

    def shapes(self, a: LayerSizes) -> dict[str, Shape]:
        return {self.hf: (getattr(a, self.size),)}

    def whole_shape(self, a: LayerSizes) -> Shape:
        return (getattr(a, self.size),)

    def shard(self, a: LayerSizes, read: ReadHF, rank: int, tp: int) -> Tensor:
        return read(self.hf)

    def restore(self, a: LayerSizes, name: str, whole: ReadWhole) -> Tensor:
        return whole(slice(None))


@dataclass(frozen=True)
class FusedQKV:
    """Query, key and value projections, fused per group: [its query heads, its key head, its value head].

    Sharded by groups. With more ranks than groups the ranks of a group share out its query heads, and each of them has
    its key and its value head. ``suffix`` is "weight", with rows of ``hidden_size``, or "bias".
    """

    suffix: str

    @property
    def parameter(self) -> str:
        return f"self_attention.linear_qkv.{self.suffix}"

    @property
    def stored(self) -> str:
        return self.parameter

    def shapes(self, a: LayerSizes) -> dict[str, Shape]:
        sizes = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
        return {self._hf(which): (count * a.head_dim, *self._columns(a)) for which, count in sizes.items()}

    def whole_shape(self, a: LayerSizes) -> Shape:
        return ((a.heads + 2 * a.kv_heads) * a.head_dim, *self._columns(a))

    def shard(self, a: LayerSizes, read: ReadHF, rank: int, tp: int) -> Tensor:
        groups = a.kv_heads_of_rank(tp)
        pair = slice(rank * a.kv_heads // tp, rank * a.kv_heads // tp + groups)  # of key and value heads
        parts = []
        for which, heads in (("q", share(a.heads, rank, tp)), ("k", pair), ("v", pair)):
            rows = read(self._hf(which), rows=slice(heads.start * a.head_dim, heads.stop * a.head_dim))
            parts.append(rows.view(groups, -1, *self._columns(a)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    @staticmethod
    def places(a: LayerSizes, rank: int, tp: int) -> list[int]:
        """Which of the whole parameter's heads are those of a shard with one group, in its order, which ascends."""
        queries, in_group = a.heads // tp, a.heads // a.kv_heads
        group, part = divmod(rank, a.kv_copies(tp))
        start = group * (in_group + 2)
        first = start + part * queries
        return [*range(first, first + queries), start + in_group, start + in_group + 1]

    def restore(self, a: LayerSizes, name: str, whole: ReadWhole) -> Tensor:
        queries = a.heads // a.kv_heads * a.head_dim
        starts = {"q": 0, "k": queries, "v": queries + a.head_dim}
        stops = {"q": queries, "k": queries + a.head_dim, "v": queries + 2 * a.head_dim}
        which = next(which for which in starts if self._hf(which) == name)
        fused = whole(slice(None)).view(a.kv_heads, queries + 2 * a.head_dim, *self._columns(a))
        return fused[:, starts[which] : stops[which]].flatten(0, 1)

    def _hf(self, which: str) -> str:
        return f"self_attn.{which}_proj.{self.suffix}"

    def _columns(self, a: LayerSizes) -> Shape:
        return (a.hidden_size,) if self.suffix == "weight" else ()


@dataclass(frozen=True)
class GateAndUp:
    """Gate and up projections of the MLP: a shard stacks its rows of both, the whole stacks both whole."""

    parameter: str = "mlp.linear_fc1.weight"
    stored: str = "mlp.linear_fc1.weight"
    hf: tuple[str, str] = ("mlp.gate_proj.weight", "mlp.up_proj.weight")

    def shapes(self, a: LayerSizes) -> dict[str, Shape]:
        return dict.fromkeys(self.hf, (a.ffn_size, a.hidden_size))

    def whole_shape(self, a: LayerSizes) -> Shape:
        return (2 * a.ffn_size, a.hidden_size)

    def shard(self, a: LayerSizes, read: ReadHF, rank: int, tp: int) -> Tensor:
        return torch.cat([read(name, rows=share(a.ffn_size, rank, tp)) for name in self.hf])

    def restore(self, a: LayerSizes, name: str, whole: ReadWhole) -> Tensor:
        half = self.hf.index(name)
        return whole(slice(half * a.ffn_size, (half + 1) * a.ffn_size))


@dataclass(frozen=True)
class ByColumns:
    """A projection back to the hidden size, sharded by its input columns."""

    parameter: str
    hf: str
    of_attention: bool  # input columns: all heads' values, or the MLP's width

    @property
    def stored(self) -> str:
        return self.parameter

    def shapes(self, a: LayerSizes) -> dict[str, Shape]:
        return {self.hf: self.whole_shape(a)}

    def whole_shape(self, a: LayerSizes) -> Shape:
        return (a.hidden_size, self._inputs(a))

    def shard(self, a: LayerSizes, read: ReadHF, rank: int, tp: int) -> Tensor:
        return read(self.hf, columns=share(self._inputs(a), rank, tp))

    def restore(self, a: LayerSizes, name: str, whole: ReadWhole) -> Tensor:
        return whole(slice(None))

    def _inputs(self, a: LayerSizes) -> int:
        return a.heads * a.head_dim if self.of_attention else a.ffn_size


def share(size: int, rank: int, parts: int) -> slice:
    """Part ``rank`` of ``size`` elements in ``parts`` equal parts."""
    return slice(size // parts * rank, size // parts * (rank + 1))


#: What every family has.
COMMON_LAYER: tuple[Rule, ...] = (
    Norm("input_layernorm.weight", "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    FusedQKV("weight"),
    ByColumns("self_attention.linear_proj.weight", "self_attn.o_proj.weight", of_attention=True),
    Norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    GateAndUp(),
    ByColumns("mlp.linear_fc2.weight", "mlp.down_proj.weight", of_attention=False),
)
