"""Losses of the fused model, of the specialists' plain mean and of each alone, from one product per head.

Asking the loss once for a mixture and once for each specialist would take every head's product again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops.epilogue import epilogue_for
from ultrafuser_mega.ops.forward import buffer_budget, forward_statistics
from ultrafuser_mega.ops.problem import checked_problem
from ultrafuser_mega.ops.statistics import row_loss


@torch.no_grad()
def cross_entropy_of_each(
    hidden: Sequence[Tensor],
    head_weight: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
) -> Tensor:
    """Plain cross-entropy of every row, without gradients; rows with the target -100 are ignored.

    Args:
        hidden, head_weight, gate_logits, target, group, vocab_start, vocab_size: as
            :func:`~ultrafuser_mega.ops.loss.mixture_cross_entropy` takes them.

    Returns:
        (2 + n, N) fp32 (fp64 for fp64 inputs): of the mixture, of the mixture by equal weights, then of each specialist
        alone; 0 on ignored rows.

    Raises:
        InputError: shapes, types, devices or settings that do not fit.
    """
    problem = checked_problem(
        hidden,
        head_weight,
        gate_logits,
        target,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=-100,
        reduction="none",
        label_smoothing=0.0,
        z_loss=0.0,
    )
    kept, models = problem.kept(), 2 + len(problem.hidden)
    gate_weights = torch.softmax(gate_logits.masked_fill(~kept[:, None], 0.0), dim=1)
    epilogue, budget = epilogue_for(target.device, problem.hidden[0].dtype), buffer_budget(target.device)
    statistics = forward_statistics(problem, epilogue, budget, apart=gate_weights, each=True)
    return row_loss(statistics, kept.repeat(models), problem.settings).view(models, -1)
