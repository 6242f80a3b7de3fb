"""The gate: a two-layer ReLU MLP that gives each specialist's hidden state one scalar (paper, eq. 1 and app. C).

    a_j = w2 . relu(W1 h_j + b1)         w = softmax(a_1 .. a_n)

All specialists share it; where their hidden sizes differ each has its own W1 (a projection into the shared
hidden layer), while b1 and w2 stay shared. There is no output bias: it would shift all a_j alike. w2 is the second
layer's 1 x m matrix, kept as a vector; weight decay treats it as the matrix that it is.

The hidden units are sharded over the fusion group (column- then row-parallel): replicated, the gate of a 13B
trio would cost as much as a head shard. Units that pad their number to a multiple of the group are zero on
both sides and stay so under gradients and weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from ultrafuser_mega.runtime.exchange import SumForward


class Gate(nn.Module):
    """This rank's share of the gate's hidden units.

    Args:
        widths: specialist name -> hidden size d_j, in the order of the gate logits.
        units: hidden units m of the whole gate.
        group: fusion group the units are spread over.
        dtype: parameter dtype.
        device: of the parameters.
        seed: of the initial weights, which depend neither on the number of ranks nor on the device.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        units: int,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        self.group = group
        self.names = list(widths)
        self.units = units
        self.local_units = -(-units // group.size())
        self.shared = len(set(widths.values())) == 1
        rows = slice(group.rank() * self.local_units, (group.rank() + 1) * self.local_units)
        generator = torch.Generator().manual_seed(seed)
        columns = {"shared": next(iter(widths.values()))} if self.shared else dict(widths)
        self.w1 = nn.ParameterDict(
            {name: self._shard(_uniform((units, d), d, generator), rows, dtype, device) for name, d in columns.items()}
        )
        self.b1 = self._shard(_uniform((units,), max(columns.values()), generator), rows, dtype, device)
        self.w2 = self._shard(_uniform((units,), units, generator), rows, dtype, device)

    def _shard(self, whole: Tensor, rows: slice, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        part = torch.zeros((self.local_units, *whole.shape[1:]), dtype=dtype)
        part[: whole[rows].shape[0]] = whole[rows]
        return mark_sharded(nn.Parameter(part.to(device)))

    def forward(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """name -> (N, d_j) on every rank of the group; returns gate logits a (N, n), float32, equal on every rank."""
        parts = []
        for name in self.names:
            w1 = self.w1["shared" if self.shared else name]
            active = torch.relu(nn.functional.linear(hidden[name].to(w1.dtype), w1, self.b1))
            parts.append(active.float() @ self.w2.float())
        partial = torch.stack(parts, dim=1)
        return partial if self.group.size() == 1 else SumForward.apply(partial, self.group)

    def sharded_state_dict(self, prefix: str, replica: int) -> dict[str, ShardedTensor]:
        """Shards under their global names; ``replica`` is this rank's data-parallel index."""
        return {
            prefix + name: shard_rows(prefix + name, parameter, self.group, replica)
            for name, parameter in self.named_parameters()
        }


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(fan_in)  # torch.nn.Linear's default
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def mark_sharded(parameter: nn.Parameter) -> nn.Parameter:
    """Tell Megatron's gradient norm that no other rank holds a copy of this parameter."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def shard_rows(key: str, tensor: Tensor, group: dist.ProcessGroup, replica: int) -> ShardedTensor:
    """``tensor`` as this rank's rows of a global tensor spread over ``group``.

    The padding at the end depends on the group's size, so a checkpoint may be read with another one.
    """
    return ShardedTensor.from_rank_offsets(
        key, tensor, (0, group.rank(), group.size()), replica_id=(0, replica), allow_shape_mismatch=True
    )
