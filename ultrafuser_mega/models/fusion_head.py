"""What happens on the fusion group: the output heads, the gate, and the mixture loss.

Every rank of the fusion group holds vocabulary rows [vocab_start, vocab_start + rows) of EVERY specialist's
head. The shared vocabulary has ``vocab_size`` entries; rows beyond it on the last ranks are padding, masked by
the loss and never exported. Rows that a specialist's own head has beyond the shared vocabulary are kept aside
unchanged (``tails``) so that a specialist leaves the program with exactly the rows it came with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from ultrafuser_mega.models.gate import Gate, mark_sharded, shard_rows
from ultrafuser_mega.models.hf_folder import Architecture, HFWeights
from ultrafuser_mega.models.weight_gradients import adding_in_place
from ultrafuser_mega.ops import Workspace, cross_entropy_of_each, distillation_loss, mixture_cross_entropy_with_rows

_ROW_MULTIPLE = 8  # rows per rank: keeps every shard's GEMM aligned for tensor cores


@dataclass(frozen=True)
class LossOptions:
    """Options of the mixture cross-entropy (see ``ops``)."""

    backend: str = "auto"
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class Lesson:
    """What a student learns of a batch (see ``ops.distillation_loss``)."""

    temperature: float = 1.0
    reverse: float = 0.0
    labels: float = 0.0


class FusionHead(nn.Module):
    """This rank's vocabulary rows of all heads, and its share of the gate.

    Args:
        architectures: specialist name -> its architecture, in the order of the gate logits.
        vocab_size: entries of the shared vocabulary.
        gate_units: hidden units of the gate.
        group: fusion group.
        dtype: parameter dtype.
        device: of the parameters; ``tails``, which are only kept, stay on the host.
        seed: of the gate's initial weights.
        loss: options of the training loss.
        student: of the architectures, one that the gate does not mix: it learns from those that it mixes.

    Attributes:
        lesson: of the student, in the steps that follow.
    """

    def __init__(
        self,
        architectures: Mapping[str, Architecture],
        vocab_size: int,
        gate_units: int,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        loss: LossOptions,
        student: str | None = None,
    ) -> None:
        super().__init__()
        self.architectures = dict(architectures)
        self.names = [name for name in architectures if name != student]  # in the order of the gate logits
        self.student, self.lesson = student, Lesson()
        self.vocab_size = vocab_size
        self.group = group
        self.loss_options = loss
        self.workspace = Workspace()
        self.rows = -(-vocab_size // (group.size() * _ROW_MULTIPLE)) * _ROW_MULTIPLE
        self.vocab_start = group.rank() * self.rows
        widths = {name: arch.hidden_size for name, arch in self.architectures.items()}
        self.heads = nn.ParameterDict(
            {
                name: mark_sharded(nn.Parameter(torch.zeros(self.rows, d, dtype=dtype, device=device)))
                for name, d in widths.items()
            }
        )
        self.gate = Gate({name: widths[name] for name in self.names}, gate_units, group, dtype, device, seed)
        self.tails: dict[str, Tensor] = {
            name: torch.zeros(arch.vocab_rows - vocab_size, arch.hidden_size, dtype=dtype)
            for name, arch in self.architectures.items()
            if arch.vocab_rows > vocab_size
        }

    @torch.no_grad()
    def load_hf(self, weights: Mapping[str, HFWeights]) -> None:
        """Read this rank's rows of heads from the specialists' weights: of those that are given."""
        stop = min(self.vocab_start + self.rows, self.vocab_size)
        for name, arch in self.architectures.items():
            if name not in weights:
                continue
            head = self.heads[name]
            head.zero_()
            if stop > self.vocab_start:
                head[: stop - self.vocab_start] = weights[name].head(slice(self.vocab_start, stop))
            if name in self.tails:
                self.tails[name].copy_(weights[name].head(slice(self.vocab_size, arch.vocab_rows)))

    def loss(self, hidden: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training loss summed over the rows: of the fused model (paper, eq. 2), or of the student.

        Args:
            hidden: name -> (N, d_j), every specialist's rows (after the exchange).
            target: (N,) next-token ids.

        Returns:
            loss () float32, with gradients; loss of every row (N,) and gate weights (N, n), detached.
        """
        if self.student is not None:
            return self._student_loss(self.student, hidden, target)
        gate_logits = self.gate(hidden)
        backend, heads = self.loss_options.backend, [self.heads[name] for name in self.names]
        weights, into = adding_in_place(heads) if backend in ("auto", "chunked") else (heads, None)
        total, rows = mixture_cross_entropy_with_rows(
            [hidden[name] for name in self.names],
            weights,
            gate_logits,
            target,
            reduction="sum",
            backend=backend,
            head_main_grad=into,
            workspace=self.workspace,
            label_smoothing=self.loss_options.label_smoothing,
            z_loss=self.loss_options.z_loss,
            **self._shard,
        )
        return total, rows, gate_logits.detach().softmax(dim=1)

    def _student_loss(
        self, student: str, hidden: Mapping[str, Tensor], target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            gate_logits = self.gate(hidden)
        states, heads, _ = self._mixture(hidden, gate_logits)
        found = distillation_loss(
            hidden[student],
            self.heads[student],
            [h.detach() for h in states],
            [head.detach() for head in heads],
            gate_logits,
            target,
            reduction="sum",
            workspace=self.workspace,
            **asdict(self.lesson),
            **self._shard,
        )
        return found.loss, found.row_losses, gate_logits.softmax(dim=1)

    @torch.no_grad()
    def evaluate(self, hidden: Mapping[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """Plain cross-entropy (2 + n, N) of the fused model, of the mean of all logits and of every specialist alone;
        with a student (4 + n, N): of the student, the mean, every specialist of the teacher, the teacher, the student;
        gate weights (N, n)."""
        gate_logits = self.gate(hidden)
        losses = cross_entropy_of_each(*self._mixture(hidden, gate_logits), target, **self._shard)
        if self.student is not None:
            of_student, alone = [hidden[self.student]], gate_logits.new_zeros((len(target), 1))
            own = cross_entropy_of_each(of_student, [self.heads[self.student]], alone, target, **self._shard)[:1]
            losses = torch.cat((own, losses[1:], losses[:1], own))
        return losses, gate_logits.softmax(dim=1)

    def _mixture(self, hidden: Mapping[str, Tensor], gate_logits: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return [hidden[name] for name in self.names], [self.heads[name] for name in self.names], gate_logits

    @property
    def _shard(self) -> dict[str, Any]:
        return {
            "group": self.group if self.group.size() > 1 else None,
            "vocab_start": self.vocab_start,
            "vocab_size": self.vocab_size,
        }

    def sharded_state_dict(self, replica: int) -> dict[str, ShardedTensor]:
        """Heads, tails and gate under their global names; ``replica`` is this rank's data-parallel index."""
        state = {
            f"heads.{name}": shard_rows(f"heads.{name}", head, self.group, replica) for name, head in self.heads.items()
        }
        for name, tail in self.tails.items():
            copy = (self.group.rank(), replica)
            state[f"tails.{name}"] = ShardedTensor.from_rank_offsets(f"tails.{name}", tail, replica_id=copy)
        return state | self.gate.sharded_state_dict("gate.", replica)
