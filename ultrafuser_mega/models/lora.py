"""Low-rank adapters beside Megatron-core's parallel linear maps: y = W x + s B A x (Hu et al. 2021).

Every projection of a Hugging Face layer (q_proj, gate_proj, ..) has an A and a B of its own, as PEFT has it, though
Megatron fuses some of them into one linear map. There the adapters of one map are computed together: one product with
all A, one with all B, whose rows are put in the map's order with zeros where a projection's output is not of an A.

With t tensor-parallel ranks, T tokens, r the rank, R = r times the map's adapted projections:

    to heads or MLP width     A whole on every rank, B by rows.  u = A x, (T, R); its gradient is summed over the ranks.
    back to the hidden size   A by columns, B whole on every rank.  u = A x is summed over the ranks.

Under sequence parallelism x, or u, is a part of the sequence: u is gathered, or scattered, and what is whole on every
rank gets a partial gradient, which Megatron sums as it does a norm's. So ranks send R numbers of a token, never its
hidden state, for the adapters' sake.

An adapter is the map's neighbour, not its part: a hook on the map's forward adds what it gives, and weights, names and
checkpoints of the map stay as they are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from ultrafuser_mega.config import Lora
from ultrafuser_mega.models.families.rules import LayerSizes
from ultrafuser_mega.runtime.shared_rows import SharedRows, mark_shared


@dataclass(frozen=True)
class Projection:
    """One projection of a layer, as one of ``tp`` ranks has it.

    Attributes:
        name: in Hugging Face's layer, without its module.
        inputs: of the whole.
        outputs: of the whole.
        rows: outputs of this rank.
        pieces: that the whole outputs are cut into, of which this rank has number ``piece``.
        copies: consecutive ranks that have the same piece.
    """

    name: str
    inputs: int
    outputs: int
    rows: int
    pieces: int
    piece: int
    copies: int = 1


@dataclass(frozen=True)
class LinearMap:
    """One of a layer's linear maps: its path in Megatron's layer, and what it computes, in the order of its outputs.

    ``groups``: times that its projections' outputs alternate. ``to_hidden``: its input is sharded, not its output.
    """

    path: str
    projections: tuple[Projection, ...]
    groups: int
    to_hidden: bool


def linear_maps(a: LayerSizes, rank: int, tp: int) -> tuple[LinearMap, ...]:
    """Those of every family's layer, on tensor-parallel rank ``rank`` of ``tp``."""
    groups, copies = a.kv_heads_of_rank(tp), a.kv_copies(tp)
    wide, pair, hidden = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.hidden_size

    def to_heads(name: str, outputs: int) -> Projection:
        return Projection(name, hidden, outputs, outputs // tp, tp, rank)

    def shared(name: str) -> Projection:
        return Projection(name, hidden, pair, groups * a.head_dim, tp // copies, rank // copies, copies)

    def back(name: str, inputs: int) -> Projection:
        return Projection(name, inputs, hidden, hidden, 1, 0)

    return (
        LinearMap(
            "self_attention.linear_qkv", (to_heads("q_proj", wide), shared("k_proj"), shared("v_proj")), groups, False
        ),
        LinearMap("self_attention.linear_proj", (back("o_proj", wide),), 1, True),
        LinearMap("mlp.linear_fc1", (to_heads("gate_proj", a.ffn_size), to_heads("up_proj", a.ffn_size)), 1, False),
        LinearMap("mlp.linear_fc2", (back("down_proj", a.ffn_size),), 1, True),
    )


class Adapter(nn.Module):
    """The adapters of one linear map's projections, on one rank.

    Args:
        of: the map.
        lora: rank, scale, dropout and which projections.
        group: tensor-parallel group.
        sequence_parallel: hidden states of the size d are parts of the sequence.
        dtype: of the parameters.
        device: of them.
        seed: of every A's initial numbers, by projection; every B begins as zeros.
    """

    def __init__(
        self,
        of: LinearMap,
        lora: Lora,
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
        seed: str,
    ) -> None:
        super().__init__()
        self.of, self.lora, self.group, self.sequence_parallel = of, lora, group, sequence_parallel
        self.adapted = [part for part in of.projections if part.name in lora.targets]
        rank, tp = group.rank(), group.size()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for part in self.adapted:
            a = _initial(lora.rank, part.inputs, f"{seed}/{part.name}")
            if of.to_hidden:
                a = a.chunk(tp, dim=1)[rank]
            self.a[part.name] = nn.Parameter(a.to(dtype).to(device).contiguous())
            self.b[part.name] = nn.Parameter(torch.zeros(part.rows, lora.rank, dtype=dtype, device=device))
            if part.copies > 1:
                mark_shared(self.b[part.name], SharedRows(0, part.copies))
            sharded, whole = (self.a, self.b) if of.to_hidden else (self.b, self.a)
            set_tensor_model_parallel_attributes(sharded[part.name], True, 1 if of.to_hidden else 0, 1)
            whole[part.name].sequence_parallel = sequence_parallel

    def forward(self, x: Tensor, y: Tensor, dropout: int | None) -> Tensor:
        """``y`` with what the adapters give for ``x`` added.

        Args:
            x: the map's input on this rank.
            y: its output there.
            dropout: seed of which inputs are left out; None: none.
        """
        if dropout is not None and self.lora.dropout:
            x = self._thinned(x, dropout)
        u = F.linear(x, torch.cat([self.a[part.name] for part in self.adapted]))
        if self.group.size() > 1:
            u = self._whole(u)
        return torch.addmm(y, u, self._rows_in_order().t(), alpha=self.lora.scale)

    def _whole(self, u: Tensor) -> Tensor:
        if self.of.to_hidden:
            summed = reduce_from_tensor_model_parallel_region
            return (reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else summed)(
                u, group=self.group
            )
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(u, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(u, group=self.group)

    def _rows_in_order(self) -> Tensor:
        """(outputs of this rank, R): every B in the columns of its own A, rows as the map has them."""
        groups, rank, columns = self.of.groups, self.lora.rank, len(self.adapted) * self.lora.rank
        at, blocks = 0, []
        for part in self.of.projections:
            if part in self.adapted:
                block = self.b[part.name].view(groups, -1, rank)
                blocks.append(F.pad(block, (at, columns - at - rank)))
                at += rank
            else:
                first = next(iter(self.b.values()))
                blocks.append(first.new_zeros(groups, part.rows // groups, columns))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def _thinned(self, x: Tensor, seed: int) -> Tensor:
        """Some numbers of ``x`` left out, the others scaled; what ranks hold the same of stays the same."""
        whole = not self.of.to_hidden and not self.sequence_parallel
        words = f"{seed}/{self.of.path}/{0 if whole else self.group.rank()}"
        generator = torch.Generator(x.device).manual_seed(zlib.crc32(words.encode()))
        kept = torch.empty(x.shape, device=x.device).uniform_(generator=generator) >= self.lora.dropout
        return x * kept / (1 - self.lora.dropout)

    def described(self, prefix: str, layer: int, layers: int, replica: int) -> Iterator[tuple[str, ShardedTensor]]:
        """Every parameter as a part of a checkpoint's ``<prefix><projection>.lora_A`` (layers, r, inputs) and
        ``.lora_B`` (layers, outputs, r)."""
        rank, tp = self.group.rank(), self.group.size()
        for part in self.adapted:
            # Of the whole tensor (axis, part, parts) if any, and which copy of it this rank has.
            whole: tuple[list[tuple[int, int, int]], int] = [], rank
            sharded = [(1, part.piece, part.pieces)], rank % part.copies
            if self.of.to_hidden:
                sharded = [(2, rank, tp)], 0
            a, b = (sharded, whole) if self.of.to_hidden else (whole, sharded)
            for letter, parameter, (cuts, copy) in (("A", self.a[part.name], a), ("B", self.b[part.name], b)):
                yield (
                    f"{prefix}{layer}.{part.name}.lora_{letter}",
                    ShardedTensor.from_rank_offsets(
                        f"{prefix}{part.name}.lora_{letter}",
                        parameter,
                        (0, layer, layers),
                        *cuts,
                        replica_id=(copy, replica),
                        prepend_axis_num=1,
                    ),
                )


class Adapters(nn.Module):
    """All adapters of a specialist's pipeline stage, beside the linear maps of its layers.

    Args:
        layers: of the stage.
        a: their sizes.
        lora: of the adapters.
        group: tensor-parallel group.
        sequence_parallel: as in the layers.
        dtype: of the parameters.
        device: of them.
        seed: of the initial numbers, which depend neither on the layout nor on the device.
        name: of the specialist.
    """

    def __init__(
        self,
        layers: Sequence[TransformerLayer],
        a: LayerSizes,
        lora: Lora,
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        name: str,
    ) -> None:
        super().__init__()
        self.lora = lora
        self.layers = nn.ModuleDict()
        for layer in layers:
            number = layer.layer_number - 1
            dropping = _Dropping(number)
            layer.register_forward_pre_hook(dropping.begin, with_kwargs=True)
            own = nn.ModuleDict()
            for of in linear_maps(a, group.rank(), group.size()):
                if not any(part.name in lora.targets for part in of.projections):
                    continue
                adapter = Adapter(
                    of,
                    lora,
                    group,
                    sequence_parallel=sequence_parallel,
                    dtype=dtype,
                    device=device,
                    seed=f"{seed}/{name}/{number}",
                )
                own[of.path.rpartition(".")[2]] = adapter
                layer.get_submodule(of.path).register_forward_hook(_beside(adapter, dropping))
            self.layers[str(number)] = own

    def described(self, prefix: str, layers: int, replica: int) -> dict[str, ShardedTensor]:
        """Flat name -> parameter as a part of a checkpoint's tensor; ``layers``: of the whole specialist."""
        return {
            key: shard
            for number, own in self.layers.items()
            for adapter in cast(nn.ModuleDict, own).values()
            for key, shard in cast(Adapter, adapter).described(prefix, int(number), layers, replica)
        }


class _Dropping:
    """The seed of a layer's dropout in the microbatch that is in it: forward, or again in its backward."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.seed: int | None = None

    def begin(self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seed = options["packed_seq_params"].dropout
        self.seed = None if seed is None else zlib.crc32(f"{seed}/{self.layer}".encode())


def _beside(adapter: Adapter, dropping: _Dropping) -> Any:
    def hook(linear: nn.Module, args: tuple[Tensor], out: tuple[Tensor, None]) -> tuple[Tensor, None]:
        return adapter(args[0], out[0], dropping.seed), out[1]

    return hook


def _initial(rank: int, inputs: int, seed: str) -> Tensor:
    """An A as PEFT begins with: Kaiming's uniform of slope sqrt 5, which is torch.nn.Linear's."""
    bound = 1 / math.sqrt(inputs)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
